"""How processes share a job in a folder: any may be killed, and rerunning the command finishes it with the same bytes.

A job is a list of blocks, which are fixed ranges of its items. The content of a block depends on its range alone, not
on the process that makes it. Processes communicate only through files, so they may start and stop at any time, on
several machines.

1. A description file, written first, says what the job makes. A process with another request is refused.
2. Process r of n makes the missing ones of blocks r, r + n, …
3. A process keeps its unfinished files in a work folder, .work-XXXXXXXX, which it locks. A work folder without a lock
   therefore belongs to a dead process, also if that ran on another machine.
4. A finished block is fsynced and renamed into place, so it is atomic.
5. A process that finds all blocks present completes the job under the folder's lock, and removes what is not needed
   any more.

So nothing has to be undone after a kill. On a file system without locks, work folders of dead processes remain, and two
processes may write the same block, with the same bytes.
"""

import errno
import os
import shutil
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, Generic, TypeVar

from ldit.errors import RequestError, RunError, brief
from ldit.log import logger
from ldit.storage.atomic import fsync, make_folder
from ldit.storage.locks import held_by_other, hold, locked
from ldit.storage.names import WORK
from ldit.storage.outputs import disk_error

Block = TypeVar("Block")
T = TypeVar("T")


class SharedJob(ABC, Generic[Block]):
    """A job whose result is `out`, made in the folder `place`. Subclasses define how a block is written and found, and
    how the job is completed.

    Call `begin`, then `make_share`; or, for single blocks, `begin`, `write`, `finish`, `close`.
    """

    ignored: tuple[str, ...] = ()
    """Keys of the description that may differ when the job is continued, with all keys below them."""

    def __init__(self, out: Path, place: Path, file: str, description: dict[str, Any], blocks: Sequence[range]) -> None:
        """`description`: the JSON content of `place`/`file`. `blocks`: the items of each block."""
        self.out, self.place, self.description_file = out, place, place / file
        self.description, self.blocks = description, blocks
        self._work: Path | None = None
        self._work_lock = -1

    # Defined by subclasses.

    @abstractmethod
    def is_complete(self) -> bool:
        """Whether the result exists. RequestError when it is the result of another job."""

    @abstractmethod
    def has_block(self, number: int) -> bool:
        """Whether a block exists and is intact."""

    @abstractmethod
    def count_done(self) -> int:
        """The number of items in existing blocks, of all processes."""

    @abstractmethod
    def bytes_needed(self, items: int) -> int:
        """Approximate disk space of this many items."""

    def block_path(self, number: int) -> Path:
        """The path of a block, for messages."""
        return self.place

    @abstractmethod
    def _read_description(self) -> Any:
        """The content of the description file; None if there is none. An error that the user can fix if it is
        damaged."""

    @abstractmethod
    def _write_description(self, path: Path) -> None: ...

    def _adopt(self, begun: Any) -> None:
        """Take over the description with which the job was begun, of which ignored keys may differ."""

    @abstractmethod
    def _write(self, number: int, block: Block) -> None: ...

    @abstractmethod
    def _complete(self) -> bool:
        """Make the result from all blocks, under the folder's lock; False when a block is missing or damaged."""

    @abstractmethod
    def _sweep(self, has_locks: bool) -> None:
        """Remove what a complete job does not need any more, under the folder's lock."""

    # The same for every job.

    def begin(self) -> bool:
        """Join the job, or start it; False when it is complete already. RequestError when `place` holds something else;
        for another job, it names the first key that differs, and both values."""
        return self._explained(self._begin, self.place)

    def _begin(self) -> bool:
        while not self.is_complete():
            make_folder(self.place)
            # Others may finish, and remove the folder, while this process waits for its lock: check again then.
            with suppress(FileNotFoundError), locked(self.place) as has_locks:
                if self.is_complete():
                    continue
                # Refuse another job before anything is changed.
                begun = self._read_description()
                self._check_begun(begun)
                if has_locks:
                    self._remove_dead()
                # Still under the folder's lock: until the new work folder is locked itself, others would take it for a
                # dead process's.
                self._open_work()
                if begun != self.description:
                    self._put(self.description_file, self._write_description)
                return True
        # A process may have been killed between completing the job and cleaning up.
        with suppress(FileNotFoundError), locked(self.place) as has_locks:
            self._sweep(has_locks)
        return False

    def _check_begun(self, begun: Any) -> None:
        """RequestError when `begun`, the content of the description file, describes another job."""
        if begun is not None:
            self._check_same(begun)
            self._adopt(begun)

    def _check_same(self, begun: Any) -> None:
        compare(self.out, begun, self.description, self.ignored)

    def make_share(self, rank: int, size: int, make: Callable[[Iterator[int]], None]) -> bool:
        """Make the missing blocks of process `rank` of `size`. Returns whether the job is complete afterwards; False
        when other processes are still working. `make` is called with the numbers of the blocks to write, if any."""
        try:
            for _ in range(2):  # a second time if `finish` found a damaged block
                missing = (number for number in range(rank, len(self.blocks), size) if not self.has_block(number))
                first = next(missing, None)
                if first is not None:
                    make(chain((first,), missing))
                if self.finish():
                    return True
        finally:
            self.close()
        if size == 1:
            raise RunError(f"{self.out}: a block disappeared meanwhile; rerun the same command to make it again")
        logger.info("process %d of %d is done; %d of %d images are done", rank, size, self.count_done(), self._items)
        return False

    def write(self, number: int, block: Block) -> None:
        """Write a block; RunError when the disk is full, with the bytes needed."""
        needed = self.bytes_needed(len(self.blocks[number]))

        def work() -> None:
            if shutil.disk_usage(self.place).free < needed:
                raise OSError(errno.ENOSPC, "no space left")
            self._write(number, block)

        try:
            self._explained(work, self.block_path(number), needed)
        except FileNotFoundError:
            if not self.is_complete():  # if it is, others finished and removed this process's work folder
                raise

    def finish(self) -> bool:
        """Complete the job if all blocks exist; returns whether it is complete."""
        try:
            return self._explained(self._finish, self.out, self.bytes_needed(self._items))
        except FileNotFoundError:  # others finished and removed the folder
            return self.is_complete()

    def _finish(self) -> bool:
        with locked(self.place) as has_locks:
            if not self.is_complete() and not self._complete():
                return False
            self._sweep(has_locks)
        return True

    def close(self) -> None:
        """Remove this process's work folder, with its unfinished files."""
        if self._work is not None:
            shutil.rmtree(self._work, ignore_errors=True)
            os.close(self._work_lock)
        self._work = None

    @property
    def _items(self) -> int:
        return sum(map(len, self.blocks))

    def _open_work(self) -> None:
        self._work = self.place / f"{WORK}{uuid.uuid4().hex[:8]}"
        self._work.mkdir()
        self._work_lock = hold(self._work)

    def _remove_dead(self) -> None:
        """Remove the work folders of dead processes."""
        for path in self.place.glob(f"{WORK}*"):
            if path != self._work and not held_by_other(path):
                shutil.rmtree(path, ignore_errors=True)

    def _half(self, name: str) -> Path:
        """The path at which this process writes an unfinished file."""
        assert self._work is not None, "begin() first"
        return self._work / name

    def _put(self, path: Path, write: Callable[[Path], None]) -> None:
        """Write a file atomically: in the work folder, fsynced, renamed."""
        half = self._half(path.name)
        write(half)
        fsync(half)
        self._rename(half, path)

    def _rename(self, half: Path, path: Path) -> None:
        os.replace(half, path)
        fsync(path.parent)

    def _explained(self, work: Callable[[], T], path: Path, needed: int = 0) -> T:
        """`work()`; an OSError becomes a RunError of one line. FileNotFoundError is left to the caller."""
        try:
            return work()
        except FileNotFoundError:
            raise
        except OSError as error:
            needs = f"it needs about {needed:,} bytes ({self.bytes_needed(self._items):,} in all)" if needed else ""
            kept = "finished blocks are kept, rerun the same command to continue"
            raise disk_error(error, path, self.place, needs, kept) from None


def cut(num: int, size: int) -> list[range]:
    """Items 0 … num-1 in blocks of `size`; the last block may be shorter."""
    return [range(first, min(first + size, num)) for first in range(0, num, size)]


def compare(out: Path, begun: Any, requested: dict[str, Any], ignored: Sequence[str] = ()) -> None:
    """RequestError when the job begun in `out` is not the requested one, with the first key that differs and both
    values. The keys in `ignored`, and all below them, may differ."""
    old, new = _flattened(begun), _flattened(requested)
    for key in [*new, *sorted(old.keys() - new.keys())]:
        may_differ = any(f"{key}.".startswith(f"{name}.") for name in ignored)
        if not may_differ and old.get(key) != new.get(key):
            raise RequestError(
                f"--out {out}: made with {key} {brief(old.get(key))}, this command has {brief(new.get(key))}; "
                "choose another place or give the same command"
            )


def _flattened(data: Any, prefix: str = "") -> dict[str, Any]:
    """A nested object as a flat one with dotted keys."""
    if not isinstance(data, dict):
        return {prefix.removesuffix("."): data}
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= _flattened(value, f"{prefix}{key}.")
    return flat
