"""A set of images in the making: processes that know each other by its files alone, and may die at any time.

samples.json, written first, says what is made (`ldit.pipeline.sets.job`); a process that would make something else is
refused. What is written lies in a folder of its process, .work-…, locked for as long as that lives, until it is whole
and on the disk; then it is renamed. Whoever sees all blocks says in samples.json that the set is complete. Nothing has
to be undone after a death: what a block lacks is made again.
"""

import errno
import json
import os
import shutil
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ldit.codecs.pixels import to_pil
from ldit.errors import RequestError, RunError
from ldit.pipeline.sets.job import Labels, compare, cut, ended
from ldit.storage.atomic import fsync, make_folder, write_json
from ldit.storage.locks import held_by_other, hold, locked

JOB = "samples.json"
_WORK = ".work-"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TEXT = "ldit"  # the PNG chunk with the settings

T = TypeVar("T")


class Block(NamedTuple):
    """Consecutive images of a set, sampled together: uint8 (B, 3, H, W) on the CPU."""

    rows: range
    images: Tensor
    labels: tuple[int, ...]


class SetFiles(ABC):
    """The files of the set that `job` describes, made at `out`; all but the end lies in `place`."""

    def __init__(self, out: Path, place: Path, job: dict[str, Any], labels: Labels) -> None:
        self.out, self.place, self.job, self.labels = out, place, job, labels
        self.blocks: Sequence[range] = cut(job["num"], job["batch_size"])
        self.height, self.width = job["size"]
        self._work: Path | None = None
        self._held = -1

    @abstractmethod
    def whole(self) -> bool:
        """Whether the set is complete. RequestError when what is there is another one."""

    @abstractmethod
    def stands(self, number: int) -> bool:
        """Whether this block needs not be made."""

    @abstractmethod
    def done(self) -> int:
        """Images that stand, whoever made them."""

    @abstractmethod
    def _write(self, number: int, block: Block) -> None: ...

    @abstractmethod
    def _finish(self) -> bool: ...

    def begin(self) -> bool:
        """Whether there is anything to do. RequestError for a place that holds something else, with the key and both
        values where that is another set."""
        return self._explained(self._begin, self.place)

    def write(self, number: int, block: Block) -> None:
        """Put a block in its place; RunError in one line when the disk is full."""
        try:
            self._explained(lambda: self._write(number, block), self.place, block.images.numel())
        except FileNotFoundError:
            if not self.whole():  # where others finished, and removed what the making needed
                raise

    def finish(self) -> bool:
        """Whether the set is complete now: if all blocks stand, this says so."""
        try:
            return self._explained(self._finish, self.out, self.bytes())
        except FileNotFoundError:
            return self.whole()

    def close(self) -> None:
        """Remove what this process had half written."""
        if self._work is not None:
            shutil.rmtree(self._work, ignore_errors=True)
        if self._held >= 0:
            os.close(self._held)
        self._work, self._held = None, -1

    def bytes(self) -> int:
        """Of all images, as plain numbers."""
        return int(self.job["num"]) * self.height * self.width * 3

    @abstractmethod
    def _sweep(self) -> None:
        """Remove what a complete set has no use for: a process may have been killed before it could."""

    def _begin(self) -> bool:
        while not self.whole():
            make_folder(self.place)
            with suppress(FileNotFoundError), locked(self.place) as held:
                begun = self._check_job()
                if held:
                    self._remove_dead()
                self._open_work()
                if begun != self.job:
                    self._put(self.place / JOB, lambda path: write_json(path, self.job))
                return True
        self._sweep()
        return False

    def _check_job(self) -> Any:
        """What is written of the set, None for nothing yet, which is taken over; RequestError where it is another, or
        none of ours."""
        names, begun = set(os.listdir(self.place)), None
        if JOB in names:
            begun = read_job(self.place / JOB)
            self.job = compare(self.out, begun, self.job)
        for name in sorted(names):
            if not name.startswith(".") and not (JOB in names and self._is_own(name)):
                raise RequestError(f"--out {self.out}: holds {name}, which is not of this set; choose another name")
        return begun

    @abstractmethod
    def _is_own(self, name: str) -> bool:
        """Whether a file of that name in `place` may be of this set."""

    def _open_work(self) -> None:
        """Under the lock of `place`, so that nobody takes it for the remains of the dead before it is locked."""
        self._work = self.place / f"{_WORK}{uuid.uuid4().hex[:8]}"
        self._work.mkdir()
        self._held = hold(self._work)

    def _remove_dead(self) -> None:
        """Remove what processes that are no more had half written."""
        for path in self.place.glob(f"{_WORK}*"):
            if path != self._work and not held_by_other(path):
                shutil.rmtree(path, ignore_errors=True)

    def _put(self, path: Path, write: Callable[[Path], None]) -> None:
        """A file that appears whole: written in this process's own folder, pushed to the disk, renamed."""
        half = self._half(path.name)
        write(half)
        self._place_whole(half, path)

    def _place_whole(self, half: Path, path: Path) -> None:
        fsync(half)
        os.replace(half, path)
        fsync(path.parent)

    def _half(self, name: str) -> Path:
        assert self._work is not None, "begin() first"
        return self._work / name

    def _explained(self, work: Callable[[], T], path: Path, needed: int = 0) -> T:
        """`work()`, with faults of the file system in one line; FileNotFoundError is for the caller."""
        try:
            return work()
        except FileNotFoundError:
            raise
        except OSError as error:
            what = error.strerror or str(error)
            if error.errno in _FULL and needed:
                what += f": it needs about {needed:,} bytes"
                with suppress(OSError):
                    what += f", {shutil.disk_usage(self.place).free:,} are free"
            raise RunError(
                f"{path} was not written: {what}; what stands is intact, and the same command goes on"
            ) from None


class FolderWriter(SetFiles):
    """DIR/000000.png …, each with its settings inside, and DIR/samples.json."""

    def __init__(self, out: Path, job: dict[str, Any], labels: Labels) -> None:
        super().__init__(out, out, job, labels)

    def path(self, index: int) -> Path:
        return self.out / f"{index:0{_digits(self.job['num'])}d}.png"

    def whole(self) -> bool:
        if not (self.out / JOB).exists():
            return False
        begun = read_job(self.out / JOB)
        compare(self.out, begun, self.job)
        return begun.get("complete") is True and all(map(self.stands, range(len(self.blocks))))

    def stands(self, number: int) -> bool:
        return all(_filled(self.path(index)) for index in self.blocks[number])

    def done(self) -> int:
        return sum(name.endswith(".png") for name in os.listdir(self.out))

    def _is_own(self, name: str) -> bool:
        return name == JOB or is_image_of(name, self.job["num"])

    def _write(self, number: int, block: Block) -> None:
        pairs = list(zip(block.rows, to_pil(block.images), strict=True))
        for (index, image), label in zip(pairs, block.labels, strict=True):
            half = self._half(self.path(index).name)
            image.save(half, pnginfo=self._settings(index, label))
            fsync(half)
        for index, _ in pairs:
            os.replace(self._half(self.path(index).name), self.path(index))
        fsync(self.out)

    def _settings(self, index: int, label: int) -> PngInfo:
        job = self.job
        said = {name: job[name] for name in ("source", "sampling", "dtype", "ema", "training")}
        said |= {"seed": job["seed"] + index, **({} if self.labels.rule is None else {"label": label})}
        said |= {} if job["guide"] is None else {"guide": job["guide"]["source"]}
        info = PngInfo()
        info.add_text(_TEXT, json.dumps(said))
        return info

    def _finish(self) -> bool:
        with locked(self.out) as held:
            if not self.whole():
                if not all(map(self.stands, range(len(self.blocks)))):
                    return False
                self._put(self.out / JOB, lambda path: write_json(path, ended(self.job, self.labels)))
            if held:
                self._remove_dead()
        return True

    def _sweep(self) -> None:
        with locked(self.out) as held:
            if held:
                self._remove_dead()


def is_image_of(name: str, num: int) -> bool:
    """Whether a file is called as one of the images of a folder of `num`."""
    stem = name.removesuffix(".png")
    return stem != name and stem.isdecimal() and len(stem) == _digits(num) and int(stem) < num


def _digits(num: int) -> int:
    """Of the number in an image's name."""
    return max(6, len(str(num - 1)))


def read_job(path: Path) -> Any:
    """The content of a samples.json; RequestError when it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise RequestError(f"{path} is damaged: {error}; remove what it belongs to and start again") from None


def _filled(path: Path) -> bool:
    """Files appear whole; an empty one is what a file system may leave of a name whose content was lost with power."""
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:
        return False
