"""How far the processes of a job are together, where they know each other by their files alone."""

import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from ldit.log import logger

SAY_EVERY = 30.0  # seconds between lines where there is no terminal
LOOK_EVERY = 2.0  # seconds between looks at the files


class Progress:
    """A bar on a terminal, elsewhere a line now and then; the first process speaks."""

    def __init__(self, total: int, done: Callable[[], int], first: bool, what: str) -> None:
        """`done()` counts what stands in the files, whoever made it; `what` names the things counted."""
        self.total, self.what = total, what
        self._count, self._first = done, first
        self._done = self._before = done()
        self._begun = 0
        self._began = self._said = self._looked = time.monotonic()
        self._bar: Any = tqdm(total=total, initial=self._done, disable=None if first else True, unit=f" {what}")

    def begun(self, count: int) -> None:
        """So many more are made, and will stand in the files together with others."""
        self._begun += count
        self._show()

    def advance(self, count: int) -> None:
        """So many more stand in the files, those begun among them."""
        self._done += count
        self._begun = 0
        self._show()

    def _show(self) -> None:
        now = time.monotonic()
        if now - self._looked > LOOK_EVERY:
            self._done, self._looked = self._count(), now
        done = min(self._done + self._begun, self.total)
        if not self._bar.disable:
            self._bar.n = done
            self._bar.refresh()
        elif self._first and now - self._said > SAY_EVERY:
            self._said = now
            logger.info("%s", self._line(done, now))

    def _line(self, done: int, now: float) -> str:
        rate = max(done - self._before, 1) / (now - self._began)
        left = int((self.total - done) / rate)
        clock = f"{left // 3600}:{left % 3600 // 60:02d}:{left % 60:02d}"
        return f"{done:,} of {self.total:,} {self.what}  {rate:.2f} a second  left {clock}"

    def close(self) -> None:
        self._bar.close()
