"""The protocol by which processes share a folder: any may be killed, and the same command continues to the same bytes.

A job is a list of blocks: fixed ranges of its items. What a block holds depends on its range alone, never on who makes
it. The processes know each other by the files only, so they may start and end when they like, on several machines.

1. A description file, written first, says what is made. A process that was asked for something else is refused.
2. Process r of n makes the blocks r, r + n, … that are not there yet.
3. What is half written lies in a work folder of its process, .work-XXXXXXXX, locked while that process lives. So the
   remains of a dead process can be told from the work of a living one, on another machine too.
4. A finished block is fsynced and renamed into place: it is there whole or not at all.
5. Whoever finds all blocks there completes the job under the folder's lock, and removes what is needed no more.

So a kill leaves nothing to undo: the same command makes what is missing and ends in the same bytes. On a file system
without locks the remains of dead processes stay, and two processes may write the same block, with the same bytes.
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

"""How names of work folders begin."""
Block = TypeVar("Block")
T = TypeVar("T")


class SharedJob(ABC, Generic[Block]):
    """A job whose result is `out`, made in the folder `place`. Subclasses say how a block is written and found, and how
    the job is completed.

    The order of calls is `begin`, `make_share`; or, for a single block, `begin`, `write`, `finish`, `close`.
    """

    ignored: tuple[str, ...] = ()
    """Keys of the description, with all below them, that may differ when the job is continued."""

    def __init__(self, out: Path, place: Path, file: str, description: dict[str, Any], blocks: Sequence[range]) -> None:
        """`description`, JSON-able, is what `place`/`file` says of the job; `blocks` are the items of each block."""
        self.out, self.place, self.description_file = out, place, place / file
        self.description, self.blocks = description, blocks
        self._work: Path | None = None
        self._work_lock = -1

    # What a job answers about itself.

    @abstractmethod
    def is_complete(self) -> bool:
        """Whether the result is there. RequestError when it is that of another job."""

    @abstractmethod
    def has_block(self, number: int) -> bool:
        """Whether a block is there and sound, so that nobody has to make it."""

    @abstractmethod
    def count_done(self) -> int:
        """Items whose blocks are there, whoever made them."""

    @abstractmethod
    def bytes_needed(self, items: int) -> int:
        """Disk space that so many items take, about."""

    def block_path(self, number: int) -> Path:
        """Where a block goes, for messages."""
        return self.place

    @abstractmethod
    def _read_description(self) -> Any:
        """The content of the description file, None when there is none; an error of the user's when it is damaged."""

    @abstractmethod
    def _write_description(self, path: Path) -> None: ...

    def _adopt(self, begun: Any) -> None:
        """Continue under the description with which the job was begun, where ignored keys differ."""

    @abstractmethod
    def _write(self, number: int, block: Block) -> None: ...

    @abstractmethod
    def _complete(self) -> bool:
        """Make the result of all blocks, under the folder's lock; False when a block is missing or damaged."""

    @abstractmethod
    def _sweep(self, has_locks: bool) -> None:
        """Remove what a complete job needs no more, under the folder's lock."""

    # What is the same for every job.

    def begin(self) -> bool:
        """Whether there is anything to do. RequestError when `place` belongs to something else: of another job with the
        first key that differs and both values."""
        return self._explained(self._begin, self.place)

    def _begin(self) -> bool:
        while not self.is_complete():
            make_folder(self.place)
            # Others may finish, and remove the folder, while this process waits for its lock: then look again.
            with suppress(FileNotFoundError), locked(self.place) as has_locks:
                if self.is_complete():
                    continue
                # Another job is refused before anything is changed.
                begun = self._read_description()
                self._check_begun(begun)
                if has_locks:
                    self._remove_dead()
                # Still under the lock: nobody may take the new work folder for a dead process's before it is locked.
                self._open_work()
                if begun != self.description:
                    self._put(self.description_file, self._write_description)
                return True
        # A process may have been killed after it completed the job and before it removed what was left.
        with suppress(FileNotFoundError), locked(self.place) as has_locks:
            self._sweep(has_locks)
        return False

    def _check_begun(self, begun: Any) -> None:
        """RequestError when `begun`, the content of the description file, is of another job."""
        if begun is not None:
            self._check_same(begun)
            self._adopt(begun)

    def _check_same(self, begun: Any) -> None:
        compare(self.out, begun, self.description, self.ignored)

    def make_share(self, rank: int, size: int, make: Callable[[Iterator[int]], None]) -> bool:
        """Make what is missing of the blocks of process `rank` of `size`; whether the job is complete afterwards, False
        where other processes are still at work. `make` is given the numbers of the blocks to write, if there are any.
        """
        try:
            for _ in range(2):  # a second time where a block that was there turned out to be damaged
                missing = (number for number in range(rank, len(self.blocks), size) if not self.has_block(number))
                first = next(missing, None)
                if first is not None:
                    make(chain((first,), missing))
                if self.finish():
                    return True
        finally:
            self.close()
        if size == 1:
            raise RunError(f"{self.out}: a block was lost while others were made; the same command makes it again")
        logger.info("process %d of %d is done; %d of %d images are done", rank, size, self.count_done(), self._items)
        return False

    def write(self, number: int, block: Block) -> None:
        """Put a block into its place; RunError in one line, with the bytes needed, when the disk is full."""
        needed = self.bytes_needed(len(self.blocks[number]))

        def work() -> None:
            if shutil.disk_usage(self.place).free < needed:
                raise OSError(errno.ENOSPC, "no space left")
            self._write(number, block)

        try:
            self._explained(work, self.block_path(number), needed)
        except FileNotFoundError:
            if not self.is_complete():  # else others finished, and removed this process's work folder
                raise

    def finish(self) -> bool:
        """Whether the job is complete now; if all blocks are there, this completes it."""
        try:
            return self._explained(self._finish, self.out, self.bytes_needed(self._items))
        except FileNotFoundError:  # others finished and swept
            return self.is_complete()

    def _finish(self) -> bool:
        with locked(self.place) as has_locks:
            if not self.is_complete() and not self._complete():
                return False
            self._sweep(has_locks)
        return True

    def close(self) -> None:
        """Remove what this process had half written."""
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
        """Remove the work folders of processes that are dead."""
        for path in self.place.glob(f"{WORK}*"):
            if path != self._work and not held_by_other(path):
                shutil.rmtree(path, ignore_errors=True)

    def _half(self, name: str) -> Path:
        """Where this process writes a file that is not finished."""
        assert self._work is not None, "begin() first"
        return self._work / name

    def _put(self, path: Path, write: Callable[[Path], None]) -> None:
        """A file that is there whole or not at all: written in the work folder, fsynced, renamed."""
        half = self._half(path.name)
        write(half)
        fsync(half)
        self._rename(half, path)

    def _rename(self, half: Path, path: Path) -> None:
        os.replace(half, path)
        fsync(path.parent)

    def _explained(self, work: Callable[[], T], path: Path, needed: int = 0) -> T:
        """`work()`, with errors of the file system in one line; FileNotFoundError is for the caller."""
        try:
            return work()
        except FileNotFoundError:
            raise
        except OSError as error:
            needs = f"it needs about {needed:,} bytes ({self.bytes_needed(self._items):,} in all)" if needed else ""
            kept = "what is finished is kept, and the same command continues"
            raise disk_error(error, path, self.place, needs, kept) from None


def cut(num: int, size: int) -> list[range]:
    """Items 0 … num-1 in blocks of `size`, the last one shorter."""
    return [range(first, min(first + size, num)) for first in range(0, num, size)]


def compare(out: Path, begun: Any, asked: dict[str, Any], ignored: Sequence[str] = ()) -> None:
    """RequestError when the job begun in `out` is not the one asked for: one line with the first key that differs and
    both values. The keys in `ignored`, and all below them, may differ."""
    old, new = _flattened(begun), _flattened(asked)
    for key in [*new, *sorted(old.keys() - new.keys())]:
        may_differ = any(f"{key}.".startswith(f"{name}.") for name in ignored)
        if not may_differ and old.get(key) != new.get(key):
            raise RequestError(
                f"--out {out}: made with {key} {brief(old.get(key))}, this command has {brief(new.get(key))}; "
                "choose another place or give the same command"
            )


def _flattened(data: Any, prefix: str = "") -> dict[str, Any]:
    """Nested objects as one, keys joined by points."""
    if not isinstance(data, dict):
        return {prefix.removesuffix("."): data}
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= _flattened(value, f"{prefix}{key}.")
    return flat
