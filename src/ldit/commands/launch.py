"""Batch scripts of clusters. Imports no torch."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ldit.errors import RequestError
from ldit.storage.manifest import check_not_in_checkpoint

STOPPED_BY_USR1 = 138  # exit code of a run that committed a step after SIGUSR1

# What may stand in an #SBATCH line, which Slurm reads by rules of its own.
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.,:@+-]*")
_TIME = re.compile(r"\d+(:[0-5]\d){0,2}|\d+-\d{1,2}(:[0-5]\d){0,2}")


@dataclass(frozen=True)
class SlurmJob:
    """One run on `nodes` x `gpus_per_node` GPUs; None leaves the choice to the cluster's defaults."""

    recipe: str
    out: Path
    flags: tuple[str, ...] = ()
    """Further flags of `ldit train`."""
    nodes: int = 1
    gpus_per_node: int = 8
    cpus_per_task: int | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    name: str | None = None
    notice: int = 180
    """Seconds before the time limit at which Slurm sends SIGUSR1: enough for a step and a checkpoint."""

    def check(self) -> None:
        """RequestError naming the flag whose value cannot stand in a batch script."""
        for key, number in (
            ("nodes", self.nodes),
            ("gpus-per-node", self.gpus_per_node),
            ("cpus-per-task", self.cpus_per_task),
            ("notice", self.notice),
        ):
            if number is not None and number < 1:
                raise RequestError(f"--{key}: must be at least 1, got {number}")
        for key, text in (("partition", self.partition), ("account", self.account), ("job-name", self.name)):
            if text is not None and not _WORD.fullmatch(text):
                raise RequestError(f"--{key}: only letters, digits and _ . , : @ + - can be used, got {text!r}")
        if self.time is not None and not _TIME.fullmatch(self.time):
            raise RequestError(f"--time: expected HH:MM:SS, D-HH:MM:SS or minutes, got {self.time!r}")


def write_slurm(job: SlurmJob, file: Path) -> Path:
    """Write the script of `job`, which was checked, to `file`, which must not exist."""
    check_not_in_checkpoint(file)
    try:
        with file.open("x", encoding="utf-8") as stream:
            stream.write(slurm_script(job))
    except FileExistsError:
        raise RequestError(f"{file} exists; remove it or choose another --file") from None
    return file


def slurm_script(job: SlurmJob) -> str:
    """The text for sbatch: one task a GPU, which finds its rank in srun's variables; stopped near the time limit by
    SIGUSR1, it commits a step, ends with 138, and the job is queued again under the same id."""
    name = job.name or job.recipe
    options: Sequence[tuple[str, object]] = (
        ("job-name", name),
        ("partition", job.partition),
        ("account", job.account),
        ("nodes", job.nodes),
        ("ntasks-per-node", job.gpus_per_node),
        ("gpus-per-node", job.gpus_per_node),
        ("cpus-per-task", job.cpus_per_task),
        ("time", job.time),
        ("output", f"{name}-%j.log"),
        ("open-mode", "append"),
        ("signal", f"USR1@{job.notice}"),
    )
    header = "\n".join(f"#SBATCH --{key}={value}" for key, value in options if value is not None)
    command = shlex.join(["python", "-u", "-m", "ldit", "train", job.recipe, "--out", str(job.out), *job.flags])
    # srun does not take --cpus-per-task over from the job since Slurm 22.05.
    srun = "srun --wait=60" if job.cpus_per_task is None else f"srun --wait=60 --cpus-per-task={job.cpus_per_task}"
    return f"""#!/bin/bash
{header}
#SBATCH --requeue

# Submit where ldit's environment is active: sbatch hands it on. Relative paths start where sbatch was called.
set -euo pipefail

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${{hosts%%$'\\n'*}}
export MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))

# {job.notice} s before the time limit the tasks get SIGUSR1, commit a step and end with {STOPPED_BY_USR1}.
# Queued again, the same command resumes.
code=0
{srun} {command} || code=$?
if [ "$code" -eq {STOPPED_BY_USR1} ]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"
"""
