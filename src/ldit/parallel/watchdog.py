"""A watchdog that ends a run when a process stalls, and reports which one and where."""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ldit.parallel.world import World

EXIT = 1
LISTEN = 3.0  # seconds within which a process that runs sends a heartbeat
# Files of code that waits for other processes: collectives, and with NCCL the host's wait for a copy behind them.
_COLLECTIVES = (os.path.join("torch", "distributed"), os.path.join("torch", "cuda"))


class Watchdog:
    """The run marks its progress; a thread ends the process if no mark comes for `timeout` seconds.

    Every process publishes its count of marks each second, so that the process that stalls can be named: the one with
    the lowest count, or of several the one that is not waiting in a collective.
    """

    def __init__(self, world: World, timeout: float) -> None:
        self.world, self.timeout = world, timeout
        self.interval = min(1.0, timeout / 10)
        self._mark: tuple[int, str] = (0, "start")  # number of marks, and what comes next
        self._heartbeats = 0
        self._main = threading.main_thread().ident
        self._done = threading.Event()

    def mark(self, what: str) -> None:
        """Mark progress; `what` names what comes next."""
        self._mark = (self._mark[0] + 1, what)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch while the block runs. A run of one process is not watched."""
        if self.world.size == 1:
            yield
            return
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._done.set()
            thread.join()

    def _watch(self) -> None:
        store = self.world.store
        seen, since = self._mark, time.monotonic()
        while not self._done.wait(self.interval):
            try:
                self._publish(store)
            except Exception:  # the store is gone with the main process; collectives will fail by themselves
                store = None
            if self._mark != seen:
                seen, since = self._mark, time.monotonic()
            elif time.monotonic() - since > self.timeout:
                self._end(store)

    def _publish(self, store: Any) -> None:
        """Publish this process's mark, where its main thread is, and a heartbeat."""
        if store is not None:
            self._heartbeats += 1
            store.set(f"mark/{self.world.rank}", json.dumps([*self._mark, *self._where(), self._heartbeats]))

    def _published(self, store: Any) -> dict[int, list[Any]]:
        """What each process published last: [marks, next, where, whether it is in a collective, heartbeats]."""
        names = {rank: f"mark/{rank}" for rank in range(self.world.size)}
        return {rank: json.loads(store.get(name)) for rank, name in names.items() if store.check([name])}

    def _end(self, store: Any) -> None:
        """Print which process stalls, and end this one."""
        line = f"process {self.world.rank}: no progress for {self.timeout:g} s"
        try:
            if store is None:
                raise ConnectionError("the main process is gone")
            # Listen for some seconds: a process that sends no heartbeat meanwhile is frozen or gone.
            before = self._published(store)
            for _ in range(int(LISTEN / self.interval) + 1):
                time.sleep(self.interval)
                self._publish(store)
            line += f"; {self._verdict(before, self._published(store))}"
        except Exception as error:
            line += f" (the others cannot be asked: {error or type(error).__name__})"
        print(f"ldit: {line}", file=sys.stderr, flush=True)
        os._exit(EXIT)

    def _verdict(self, before: dict[int, list[Any]], now: dict[int, list[Any]]) -> str:
        """Which process stalls, from what was published before and after listening."""
        silent = [rank for rank in range(self.world.size) if before.get(rank) == now.get(rank)]
        if silent:
            return f"process {', '.join(map(str, silent))} stalls and does not answer"
        # Those with the fewest marks before: by now some may be ending.
        least = min(entry[0] for entry in before.values())
        behind = {rank: entry for rank, entry in before.items() if entry[0] == least}
        # Of these the ones that are not in a collective, if only some are.
        busy = {rank: entry for rank, entry in behind.items() if not entry[3]}
        stalled = busy if 0 < len(busy) < len(behind) else behind
        return "; ".join(f"process {rank} stalls in {entry[1]!r} at {entry[2]}" for rank, entry in stalled.items())

    def _where(self) -> tuple[str, bool]:
        """The innermost line of the main thread, and whether it is in a collective.

        If the main thread waits for the thread that saves checkpoints, that one is described instead.
        """
        frames = sys._current_frames()
        frame: FrameType | None = frames.get(self._main or 0)
        if frame is not None and frame.f_code.co_filename == threading.__file__:  # waits for another thread
            saver = next((thread.ident for thread in threading.enumerate() if thread.name == "saver"), None)
            frame = frames.get(saver or 0, frame)
        if frame is None:
            return "an unknown place", False
        place = f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} ({frame.f_code.co_name})"
        # A collective anywhere in the stack means that it waits for other processes.
        waits = False
        while frame is not None:
            waits = waits or any(part in frame.f_code.co_filename for part in _COLLECTIVES)
            frame = frame.f_back
        return place, waits
