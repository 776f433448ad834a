"""A set of images as one .npz, as the field's evaluators read it: arr_0 (N, H, W, 3) uint8, arr_1 (N) int64 labels.

Until it is complete its blocks lie in FILE.npz.parts, each with its checksum in its name. The process that sees all of
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
from ldit.pipeline.sets.folder import CRC, JOB, Block, SetFiles, read_description
from ldit.pipeline.sets.job import Labels, ended
from ldit.storage.atomic import fsync, write_json
from ldit.storage.locks import locked
from ldit.storage.manifest import sha256_file
from ldit.storage.npz import IMAGES, LABELS, write_member
from ldit.storage.progress import LOOK_EVERY

_PART = re.compile(r"block-(\d{6,})\.([0-9a-f]{64})\.npy")


class ArrayWriter(SetFiles):
    """FILE.npz, FILE.npz.json, and FILE.npz.parts while they are made."""

    def __init__(self, out: Path, description: dict[str, Any], labels: Labels) -> None:
        super().__init__(out, out.with_name(f"{out.name}.parts"), description, labels)
        self.final_description = out.with_name(f"{out.name}.json")
        self._parts: dict[int, str] = {}  # by number, the names of the last look
        self._looked = -math.inf

    def is_complete(self) -> bool:
        if not self.out.exists():
            return False
        final = read_description(self.final_description)
        if final is None:
            raise RequestError(f"--out {self.out}: exists, and no {self.final_description.name} says what it is")
        self._check_same(final)
        if final.get(CRC) != _crc(self.out):
            raise RequestError(f"--out {self.out}: is not the file that {self.final_description.name} describes")
        return True

    def has_block(self, number: int) -> bool:
        """One look at the folder serves many blocks, as each look reads all its names. So a part that another process
        made is missed for LOOK_EVERY seconds at most; one that was removed is never taken for being there."""
        if self._is_there(number):
            return True
        if number not in self._parts and time.monotonic() - self._looked < LOOK_EVERY:
            return False
        with suppress(FileNotFoundError):  # others finished; `write` finds that out
            self._look()
        return self._is_there(number)

    def count_done(self) -> int:
        try:
            parts = self._look()
        except FileNotFoundError:  # others finished
            return int(self.description["num"])
        return sum(len(rows) for number, rows in enumerate(self.blocks) if number in parts)

    def _is_own(self, name: str) -> bool:
        return name == JOB or _number(name) is not None

    def _is_there(self, number: int) -> bool:
        """Whether the last look saw a part of this block that still is there."""
        return number in self._parts and (self.place / self._parts[number]).exists()

    def _look(self) -> dict[int, str]:
        """The names of the parts in the folder, by number; of several of one block the first. FileNotFoundError where
        others finished."""
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
                self._rename(half, self.place / name)
                self._parts[number] = name

    def _complete(self) -> bool:
        parts = self._look()
        if not all(number in parts for number in range(len(self.blocks))):
            return False
        if shutil.disk_usage(self.place).free < self.bytes_needed(self.description["num"]):
            raise OSError(errno.ENOSPC, "no space left")
        # Assemble the archive in the work folder; a part that turns out to be damaged is removed, and made again.
        half = self._half(self.out.name)
        try:
            self._assemble(half, [self.place / parts[number] for number in range(len(self.blocks))])
        except _DamagedPart as damaged:
            logger.warning("%s does not match its checksum and is made again", damaged.path)
            damaged.path.unlink(missing_ok=True)
            return False
        fsync(half)
        # The description first: an archive without one would be taken for somebody else's.
        final = {**ended(self.description, self.labels), CRC: _crc(half)}
        self._put(self.final_description, lambda path: write_json(path, final))
        self._rename(half, self.out)
        return True

    def _assemble(self, path: Path, parts: list[Path]) -> None:
        """The archive at `path`, block by block."""
        num, sides = self.description["num"], (self.height, self.width, 3)
        images = (_checked(part, (len(rows), *sides)) for part, rows in zip(parts, self.blocks, strict=True))
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            write_member(archive, IMAGES, np.dtype(np.uint8), (num, *sides), images)
            if self.labels.rule is not None:
                labels = np.array(self.labels.of(range(num)), dtype="<i8")
                write_member(archive, LABELS, labels.dtype, labels.shape, [labels])

    def _sweep(self, has_locks: bool) -> None:
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
