"""`ldit launch slurm RECIPE [flags] [-- flags of ldit train]`."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ldit.cli.arguments import parse
from ldit.cli.train import parse_arguments
from ldit.config.recipes.registry import recipe
from ldit.errors import ConfigError, RequestError

KINDS = ("slurm",)
USAGE = """usage: ldit launch slurm RECIPE [flags] [-- flags of ldit train]

Write the batch script of a cluster; ldit launch slurm --help names the flags."""


@dataclass(frozen=True)
class SlurmArguments:
    """Write an sbatch script that trains RECIPE, one task a GPU, and queues itself again when its time is over. Flags
    of ldit train follow after --."""

    recipe: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")]
    """A recipe of ldit train."""
    out: Path | None = None
    """Directory of the run; default runs/RECIPE."""
    nodes: int = 1
    """Nodes."""
    gpus_per_node: int = 8
    """GPUs of a node, and tasks on it."""
    cpus_per_task: int | None = None
    """CPU cores of a task; default the cluster's, often one, which is few for reading images."""
    time: str | None = None
    """Time limit of one stretch, HH:MM:SS; default the cluster's."""
    partition: str | None = None
    """Partition; default the cluster's."""
    account: str | None = None
    """Account; default the cluster's."""
    job_name: str | None = None
    """Name of the job and of its log NAME-JOBID.log; default the recipe's."""
    notice: int = 180
    """Seconds before the time limit at which the run is told to commit a step; more where a checkpoint takes longer."""
    file: Path = Path("train.sbatch")
    """The script; must not exist."""


def run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    if arguments[0] not in KINDS:
        raise RequestError(f"ldit launch: unknown kind of cluster {arguments[0]!r} (known: {', '.join(KINDS)})")
    split = arguments.index("--") if "--" in arguments else len(arguments)
    args = parse(SlurmArguments, arguments[1:split], "ldit launch slurm")
    out, flags = args.out or Path("runs") / args.recipe, arguments[split + 1 :]
    from ldit.commands.launch import SlurmJob, write_slurm

    job = SlurmJob(
        args.recipe,
        out,
        tuple(flags),
        args.nodes,
        args.gpus_per_node,
        args.cpus_per_task,
        args.time,
        args.partition,
        args.account,
        args.job_name,
        args.notice,
    )
    job.check()
    _check_training(args, out, flags)
    print(shlex.join(["sbatch", str(write_slurm(job, args.file))]))
    return 0


def _check_training(args: SlurmArguments, out: Path, flags: list[str]) -> None:
    """What `ldit train` would refuse is refused before the job waits in a queue for it."""
    recipe(args.recipe)
    for flag in flags:
        if flag in ("-h", "--help", "--debug") or flag.partition("=")[0] == "--out":
            raise RequestError(f"{flag} cannot stand after -- (--out comes before it)")
    config = parse_arguments([args.recipe, "--out", str(out), *flags]).config
    config.check()
    shared, train, tasks = config.parallel, config.train, args.nodes * args.gpus_per_node
    whole = shared.tp * shared.replicate * max(shared.shard, 1)
    if tasks % whole or (shared.shard and tasks != whole):
        raise ConfigError(
            f"parallel: tp {shared.tp} x shard {shared.shard or 'rest'} x replicate {shared.replicate} "
            f"does not fit {args.nodes} x {args.gpus_per_node} GPUs"
        )
    parts, micro = tasks // shared.tp, train.micro_batch_size or 1
    if train.batch_size % (parts * micro):
        raise ConfigError(
            f"train.batch_size: {train.batch_size} cannot be shared by {parts} processes in passes of {micro}"
        )
