"""RUN/skipped.jsonl: the samples that could not be read, each listed once."""

import json
from collections.abc import Iterable
from pathlib import Path

from ldit.data.batch import Fault
from ldit.log import logger
from ldit.storage.outputs import put


class SkippedLog:
    """Appends {"where", "reason", "step"} for every sample that is not in the file yet. An incomplete last line, left
    by a killed process, is dropped. Only the main process has one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: set[str] = set()
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        complete, newline, rest = text.rpartition("\n")
        if rest:
            put(path, complete + newline)
        for line in complete.splitlines():
            self.known.add(json.loads(line)["where"])

    def add(self, faults: Iterable[Fault], step: int) -> None:
        """Log and record each sample that is new."""
        for fault in faults:
            if fault.where in self.known:
                continue
            self.known.add(fault.where)
            logger.warning("step %d: left out of its batch: %s", step, fault.reason)
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"where": fault.where, "reason": fault.reason, "step": step}) + "\n")
            except OSError as error:  # no line of a log is worth a run
                logger.warning("%s: a line is missing: %s", self.path, error.strerror or error)
