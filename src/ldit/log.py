"""What a run says: lines on stderr, metrics.jsonl."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

logger = logging.getLogger("ldit")


def setup() -> None:
    """Messages of level INFO and up go to stderr, bare."""
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False


class MetricsFile:
    """RUN/metrics.jsonl: one JSON object a logged step, cut back to the committed step when a run resumes."""

    def __init__(self, path: Path, committed_step: int) -> None:
        self.path = path
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    break  # the run died while writing this line
                if record["step"] > committed_step:
                    break
                kept.append(line + "\n")
        path.write_text("".join(kept))

    def write(self, record: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
