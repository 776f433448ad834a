"""The request of `ldit launch slurm`."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from ldit.config.recipes.registry import is_run_directory
from ldit.config.requests.fields import flag
from ldit.errors import RequestError

# Values that are safe in an #SBATCH line, which Slurm parses by rules of its own.
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.,:@+-]*")
_TIME = re.compile(r"\d+(:[0-5]\d){0,2}|\d+-\d{1,2}(:[0-5]\d){0,2}")


@dataclass(frozen=True)
class SlurmRequest:
    """Options: one run on `nodes` x `gpus_per_node` GPUs. None means the cluster's default."""

    recipe: str = field(metadata=flag(positional=True))
    """Recipe, as for `ldit train`."""
    out: Path | None = None
    """Run directory. Default: runs/RECIPE."""
    nodes: int = 1
    """Number of nodes."""
    gpus_per_node: int = 8
    """GPUs per node; each gets one task."""
    cpus_per_task: int | None = None
    """CPU cores per task. Default: the cluster's, often one, which is too few to read images."""
    time: str | None = None
    """Time limit of one job, HH:MM:SS; the run continues in the next one. Default: the cluster's."""
    partition: str | None = None
    """Partition of the cluster. Default: the cluster's."""
    account: str | None = None
    """Account of the cluster that is charged. Default: the cluster's."""
    job_name: str | None = None
    """Name of the job; its log is NAME-JOBID.log. Default: that of the recipe."""
    notice: int = 180
    """Seconds before the time limit at which the run saves a checkpoint and stops. Increase it if saving takes
    longer."""
    file: Path = Path("train.sbatch")
    """Script to write; it must not exist yet."""

    def __post_init__(self) -> None:
        for key in ("nodes", "gpus_per_node", "cpus_per_task", "notice"):
            number = getattr(self, key)
            if number is not None and number < 1:
                raise RequestError(f"--{key.replace('_', '-')}: must be at least 1, got {number}")
        for key in ("partition", "account", "job_name"):
            text = getattr(self, key)
            if text is not None and not _WORD.fullmatch(text):
                raise RequestError(
                    f"--{key.replace('_', '-')}: only letters, digits and _ . , : @ + - can be used, got {text!r}"
                )
        if self.time is not None and not _TIME.fullmatch(self.time):
            raise RequestError(f"--time: expected HH:MM:SS, D-HH:MM:SS or minutes, got {self.time!r}")

    @property
    def run(self) -> Path:
        """Directory of the run."""
        if self.out is None and is_run_directory(self.recipe):
            return Path(self.recipe)
        return self.out or Path("runs") / self._word

    @property
    def name(self) -> str:
        """Name of the job, by default that of the recipe."""
        return self.job_name or self._word

    @property
    def _word(self) -> str:
        """The recipe as one word; of FILE.py:FUNCTION without punctuation."""
        return re.sub(r"[^\w.+-]+", "-", self.recipe).strip("-.")
