"""What a run's directory holds, by name. Imports nothing."""

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
