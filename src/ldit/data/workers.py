"""Threads that work off jobs in order, and never keep the process from ending."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue

_LOOK = 0.25  # seconds between checks of a job that is waited for


class Stuck(Exception):
    """A job that hangs at item `item`. The message names the thread, and since when."""

    def __init__(self, thread: str, item: int, seconds: float) -> None:
        what = f"thread {thread} has been at it" if thread else "no thread has begun with it"
        super().__init__(f"{what} for {seconds:.0f} s")
        self.item = item


class Job:
    """Work for one thread. The work calls `at` with each item that it begins."""

    def __init__(self, work: Callable[["Job"], None]) -> None:
        self.work = work
        self.thread = ""
        """Name of the thread that took the job, "" before."""
        self.item = 0
        """The current item."""
        self.since = 0.0
        """When the current item began (`time.monotonic`)."""
        self._done = threading.Event()
        self._error: BaseException | None = None

    def at(self, item: int) -> None:
        """Note that the work begins with `item`."""
        self.item, self.since = item, time.monotonic()

    def run(self) -> None:
        self.thread = threading.current_thread().name
        try:
            self.work(self)
        except BaseException as error:
            self._error = error
        self._done.set()

    def finish(self, patience: float) -> None:
        """Wait for the end of the job; raises what the work raised. Stuck when an item takes longer than `patience`
        seconds, or no thread begins the job for so long."""
        began = time.monotonic()
        while not self._done.wait(min(_LOOK, patience)):
            stuck = time.monotonic() - max(self.since, began)
            if stuck > patience:
                raise Stuck(self.thread, self.item, stuck)
        if self._error is not None:
            raise self._error


class Workers:
    """`count` threads, called NAME-0 …, that take jobs in the order of `submit`.

    They are daemon threads, unlike those of concurrent.futures: a thread that hangs in a call of the file system must
    not keep the process from ending.
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
        """Drop the jobs that no thread has begun, and wait for the others, up to `timeout` seconds."""
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
