"""What a run says: lines on stderr, metrics.jsonl."""

import json
import logging
import os
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


def say_nothing_twice() -> None:
    """For processes beside the first: what all do alike is said by that one, warnings too."""
    logger.setLevel(logging.ERROR)


class MetricsFile:
    """RUN/metrics.jsonl: one JSON object a logged step, cut back to the committed step when a run resumes."""

    def __init__(self, path: Path, committed_step: int) -> None:
        self.path = path
        self.cut(committed_step)

    def cut(self, last_step: int) -> None:
        """Take back every line from the first of a later step on."""
        path, kept = self.path, []
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        for line in lines:
            if not _is_record(line, last_step):
                break  # of a later step, or the line the run died in
            kept.append(line + "\n")
        temporary = path.with_name(f"{path.name}.tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.write("".join(kept))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

    def write(self, record: dict[str, Any]) -> None:
        """Append one line and push it to the disk, so that a committed step never lacks its log."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _is_record(line: str, last_step: int) -> bool:
    try:
        record = json.loads(line)
    except ValueError:
        return False
    step = record.get("step") if isinstance(record, dict) else None
    return isinstance(step, int) and step <= last_step
