"""What a run directory holds, by name."""

from pathlib import Path

RUN_CONFIG = "config.json"  # the resolved configuration
METRICS = "metrics.jsonl"  # an object a logged step
SKIPPED = "skipped.jsonl"  # images that could not be read
BEST = "best.json"  # the step with the best evaluation
CHECKPOINTS = "checkpoints"  # step-00000100/: an export, state/ and manifest.json
SNAPSHOTS = "snapshots"  # step-00000100/: EMA weights, from which others are reconstructed
SAMPLES = "samples"  # images drawn during training
# Within a step:
STATE = "state"  # what only training that resumes needs
OPTIMIZER = f"{STATE}/optimizer"  # stem of the optimizer's tensors
TRAINER = f"{STATE}/trainer.json"  # counters, loader position, random states

WORK = ".work-"  # beginning of the name of a folder in which a process prepares a part of a shared job


def is_run(folder: Path) -> bool:
    """Whether a folder is a run directory."""
    return (folder / CHECKPOINTS).is_dir()
