"""A set of images as one .npz, as the field's evaluators read it: arr_0 (N, H, W, 3) uint8, arr_1 (N) int64 labels.

Until it is whole its blocks lie in FILE.npz.parts, each with its checksum in its name. The process that sees all of
them streams them into the archive, so memory does not grow with N, writes FILE.npz.json (what samples.json is to a
folder), gives the archive its name and removes the parts. The bytes are a function of the images: nothing is
compressed, and dates are fixed.
"""

import errno
import hashlib
import io
import math
import os
import re
import shutil
import time
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ldit.errors import RequestError
from ldit.log import logger
from ldit.pipeline.sets.folder import JOB, Block, SetFiles, read_job
from ldit.pipeline.sets.job import Labels, compare, ended
from ldit.storage.atomic import fsync, write_json
from ldit.storage.locks import locked
from ldit.storage.manifest import sha256_file
from ldit.storage.npz import IMAGES, LABELS, write_member
from ldit.storage.progress import LOOK_EVERY

_PART = re.compile(r"block-(\d{6,})\.([0-9a-f]{64})\.npy")
CRC = "arr_0_crc32"  # what ties FILE.npz.json to its archive


class ArrayWriter(SetFiles):
    """FILE.npz, FILE.npz.json, and FILE.npz.parts while they are made."""

    def __init__(self, out: Path, job: dict[str, Any], labels: Labels) -> None:
        super().__init__(out, out.with_name(f"{out.name}.parts"), job, labels)
        self.description = out.with_name(f"{out.name}.json")
        self._parts: dict[int, str] = {}  # by number, the names of the last look
        self._looked = -math.inf

    def whole(self) -> bool:
        if not self.out.exists():
            return False
        if not self.description.exists():
            raise RequestError(f"--out {self.out}: exists, and no {self.description.name} says what it is")
        begun = read_job(self.description)
        compare(self.out, {key: value for key, value in begun.items() if key != CRC}, self.job)
        if begun.get(CRC) != _crc(self.out):
            raise RequestError(f"--out {self.out}: is not the file that {self.description.name} describes")
        return True

    def stands(self, number: int) -> bool:
        """A part that stands is never missed for longer than LOOK_EVERY, and one that was removed is not taken for
        standing: one look at the folder serves many blocks, as each reads all its names."""
        if self._is_there(number):
            return True
        if number not in self._parts and time.monotonic() - self._looked < LOOK_EVERY:
            return False
        with suppress(FileNotFoundError):  # others finished; `write` finds that out
            self._look()
        return self._is_there(number)

    def done(self) -> int:
        try:
            found = self._look()
        except FileNotFoundError:
            return int(self.job["num"])
        return sum(len(rows) for number, rows in enumerate(self.blocks) if number in found)

    def _is_own(self, name: str) -> bool:
        return name == JOB or _number(name) is not None

    def _is_there(self, number: int) -> bool:
        """Whether the last look saw a part of this block that still is there."""
        return number in self._parts and (self.place / self._parts[number]).exists()

    def _look(self) -> dict[int, str]:
        """The names of the parts that stand, by number; the first of those of one block. FileNotFoundError where others
        finished."""
        self._parts, self._looked = {}, time.monotonic()
        for name in os.listdir(self.place):
            number = _number(name)
            if number is not None:
                self._parts[number] = min(name, self._parts.get(number, name))
        return self._parts

    def _write(self, number: int, block: Block) -> None:
        half = self._half(f"{number}.npy")
        np.save(half, block.images.permute(0, 2, 3, 1).contiguous().numpy())
        fsync(half)
        name = f"block-{number:06d}.{sha256_file(half)}.npy"
        with locked(self.place):
            if number not in self._look():  # the first one stays: another machine's bits may differ
                os.replace(half, self.place / name)
                fsync(self.place)
                self._parts[number] = name

    def _finish(self) -> bool:
        with locked(self.place):
            if not self.whole():
                found = self._look()
                if not all(number in found for number in range(len(self.blocks))):
                    return False
                if shutil.disk_usage(self.place).free < self.bytes():
                    raise OSError(errno.ENOSPC, "no space left")
                half = self._half(self.out.name)
                try:
                    self._assemble(half, [self.place / found[number] for number in range(len(self.blocks))])
                except _DamagedPart as damaged:
                    logger.warning("%s does not match its checksum and is made again", damaged.path)
                    damaged.path.unlink(missing_ok=True)
                    return False
                said = {**ended(self.job, self.labels), CRC: _crc(half)}
                self._put(self.description, lambda path: write_json(path, said))
                self._place_whole(half, self.out)
            self._sweep()
        return True

    def _assemble(self, path: Path, parts: list[Path]) -> None:
        """The archive at `path`, block by block."""

        num, sides = self.job["num"], (self.height, self.width, 3)
        images = (_checked(part, (len(rows), *sides)) for part, rows in zip(parts, self.blocks, strict=True))
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            write_member(archive, IMAGES, np.dtype(np.uint8), (num, *sides), images)
            if self.labels.rule is not None:
                labels = np.array(self.labels.of(range(num)), dtype="<i8")
                write_member(archive, LABELS, labels.dtype, labels.shape, [labels])

    def _sweep(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)


class _DamagedPart(Exception):
    """The content of a part is not what its name says."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.path = path


def _checked(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The images of a part."""
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != path.name.split(".")[1]:
        raise _DamagedPart(path)
    array: np.ndarray = np.load(io.BytesIO(data), allow_pickle=False)
    if array.dtype != np.uint8 or array.shape != shape:
        raise _DamagedPart(path)
    return array


def _number(name: str) -> int | None:
    """The block that a part of this name holds."""
    match = _PART.fullmatch(name)
    return int(match[1]) if match else None


def _crc(path: Path) -> str | None:
    """The checksum that the archive keeps of its images; None when it is none, or has none."""
    try:
        with zipfile.ZipFile(path) as archive:
            return f"{archive.getinfo(f'{IMAGES}.npy').CRC:08x}"
    except (OSError, zipfile.BadZipFile, KeyError):
        return None
