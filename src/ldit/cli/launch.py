"""`ldit launch slurm RECIPE [flags] [-- flags of ldit train]`: parses the two sets of flags."""

from ldit.cli.arguments import parse
from ldit.cli.train import parse_arguments
from ldit.config.requests.launch import SlurmRequest
from ldit.errors import RequestError

TEXT = (
    "Write an sbatch script that trains RECIPE, one task a GPU, and queues itself again when its time is over. Flags "
    "of ldit train follow after --."
)


def run(arguments: list[str]) -> int:
    """`ldit launch slurm`. The training flags are parsed too, so that mistakes show before the job waits in a queue."""
    split = arguments.index("--") if "--" in arguments else len(arguments)
    request, flags = parse(SlurmRequest, arguments[:split], "ldit launch slurm", TEXT), arguments[split + 1 :]
    for flag in flags:
        if flag in ("-h", "--help", "--debug") or flag.partition("=")[0] == "--out":
            raise RequestError(f"{flag} cannot come after -- (--out comes before it)")
    config = parse_arguments([request.recipe, "--out", str(request.run), *flags]).config
    from ldit.commands.launch import run_slurm

    return run_slurm(request, flags, config)
