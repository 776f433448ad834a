"""Turns SIGINT and SIGTERM into an exception, for work whose finished parts are in files."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM; `code` is the exit code. Finished files are kept."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """SIGINT and SIGTERM raise Stopped, so that unfinished files are removed before the process ends. A second signal
    ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    numbers = (signal.SIGINT, signal.SIGTERM)

    def receive(number: int, frame: FrameType | None) -> None:
        for one in numbers:
            signal.signal(one, signal.SIG_DFL)
        raise Stopped(number)

    old = {one: signal.signal(one, receive) for one in numbers}
    try:
        yield
    finally:
        for one, handler in old.items():
            signal.signal(one, handler)
