"""Names of the files and folders of a run directory."""

from pathlib import Path

RUN_CONFIG = "config.json"  # the resolved configuration
METRICS = "metrics.jsonl"  # an object for each logged step
SKIPPED = "skipped.jsonl"  # images that could not be read
BEST = "best.json"  # the step with the best evaluation
CHECKPOINTS = "checkpoints"  # step-00000100/: an export, state/ and manifest.json
SNAPSHOTS = "snapshots"  # step-00000100/: power averages, from which EMAs of other lengths are reconstructed
SAMPLES = "samples"  # images drawn during training
# Within a step:
STATE = "state"  # needed only to resume training
OPTIMIZER = f"{STATE}/optimizer"  # stem of the optimizer's tensors
TRAINER = f"{STATE}/trainer.json"  # counters, loader position, random states

WORK = ".work-"  # prefix of the folders in which processes write unfinished files of a shared job


def is_run(folder: Path) -> bool:
    """Whether a folder is a run directory."""
    return (folder / CHECKPOINTS).is_dir()
