"""RUN/skipped.jsonl: the samples that could not be read, each once."""

import json
from collections.abc import Iterable
from pathlib import Path

from ldit.data.batch import Fault
from ldit.log import logger


class SkippedLog:
    """Appends {"where", "reason", "step"} for every sample that is not in the file yet. A line that a killed process
    left unfinished is dropped. Only the first process has one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: set[str] = set()
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        whole, newline, rest = text.rpartition("\n")
        if rest:
            path.write_text(whole + newline, encoding="utf-8")
        for line in whole.splitlines():
            self.known.add(json.loads(line)["where"])

    def add(self, faults: Iterable[Fault], step: int) -> None:
        """A warning and a line for each that is new."""
        for fault in faults:
            if fault.where in self.known:
                continue
            self.known.add(fault.where)
            logger.warning("step %d: left out of its batch: %s", step, fault.reason)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"where": fault.where, "reason": fault.reason, "step": step}) + "\n")
