"""What a run directory holds, by name."""

from pathlib import Path

CHECKPOINTS = "checkpoints"
SNAPSHOTS = "snapshots"
SAMPLES = "samples"
RUN_CONFIG = "config.json"
METRICS = "metrics.jsonl"
SKIPPED = "skipped.jsonl"
BEST = "best.json"
STATE = "state"  # of a step: what only a run that goes on needs
OPTIMIZER = f"{STATE}/optimizer"
TRAINER = f"{STATE}/trainer.json"


def is_run(folder: Path) -> bool:
    """Whether a folder is a run directory."""
    return (folder / CHECKPOINTS).is_dir()
