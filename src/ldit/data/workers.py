"""Threads that do small jobs in order and never keep the process from ending."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue


class Job:
    """Work for one thread, which calls `at` as it gets on; `wait` raises what the work raised."""

    def __init__(self, work: Callable[["Job"], None]) -> None:
        self.work = work
        self.thread = ""
        """Name of the thread that took it, "" before."""
        self.item = 0
        """What it is at."""
        self.since = 0.0
        """Since when (`time.monotonic`)."""
        self._done = threading.Event()
        self._error: BaseException | None = None

    def at(self, item: int) -> None:
        self.item, self.since = item, time.monotonic()

    def run(self) -> None:
        self.thread = threading.current_thread().name
        try:
            self.work(self)
        except BaseException as error:
            self._error = error
        self._done.set()

    def wait(self, timeout: float) -> bool:
        """Whether it is done within `timeout` seconds."""
        if not self._done.wait(timeout):
            return False
        if self._error is not None:
            raise self._error
        return True


class Workers:
    """`count` threads named NAME-0 … that take jobs in the order they were given.

    They are daemons, unlike those of concurrent.futures: one that hangs in a file system's call must not hold up the
    end of the process.
    """

    def __init__(self, count: int, name: str) -> None:
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._threads = [threading.Thread(target=self._loop, name=f"{name}-{i}", daemon=True) for i in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(self, work: Callable[[Job], None]) -> Job:
        job = Job(work)
        self._jobs.put(job)
        return job

    def close(self, timeout: float) -> None:
        """Drop what has not begun and wait for the rest, up to `timeout` seconds."""
        with suppress(Empty):
            while True:
                self._jobs.get_nowait()
        for _ in self._threads:
            self._jobs.put(None)
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0))

    def _loop(self) -> None:
        while (job := self._jobs.get()) is not None:
            job.run()
