"""Progress of a job that several processes share, counted in its files."""

import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from ldit.log import logger
from ldit.readable import clock

LINE_EVERY = 30.0  # seconds between log lines, without a terminal
LOOK_EVERY = 2.0  # seconds between counts of the files


class Progress:
    """A progress bar on a terminal, otherwise a log line every `LINE_EVERY` seconds; shown by the main process."""

    def __init__(self, total: int, count_done: Callable[[], int], is_main: bool, what: str) -> None:
        """`count_done()` counts the items in the files, of all processes; `what` names the items."""
        self.total, self.what = total, what
        self._count, self._is_main = count_done, is_main
        self._done = self._before = count_done()
        self._begun = 0.0
        self._start = self._last_line = self._last_look = time.monotonic()
        self._bar: Any = tqdm(total=total, initial=self._done, disable=None if is_main else True, unit=f" {what}")

    def begun(self, count: float) -> None:
        """`count` more items are made but not yet in a file; also parts of items, and from other threads."""
        self._begun += count
        self._show()

    def advance(self, count: int) -> None:
        """`count` more items are in files, including those announced by `begun`."""
        self._done += count
        self._begun = max(self._begun - count, 0.0)
        self._show()

    def _show(self) -> None:
        now = time.monotonic()
        if now - self._last_look > LOOK_EVERY:
            self._done, self._last_look = self._count(), now
        done = min(self._done + int(self._begun + 1e-6), self.total)
        if not self._bar.disable:
            self._bar.n = done
            self._bar.refresh()
        elif self._is_main and now - self._last_line > LINE_EVERY:
            self._last_line = now
            logger.info("%s", self._line(done, now))

    def _line(self, done: int, now: float) -> str:
        rate = max(done - self._before, 1) / (now - self._start)
        left = clock((self.total - done) / rate)
        return f"{done:,} of {self.total:,} {self.what}  {rate:.2f} a second  left {left}"

    def close(self) -> None:
        self._bar.close()
