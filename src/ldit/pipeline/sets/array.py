"""A set of images as one .npz in ADM's format: arr_0 (N, H, W, 3) uint8, arr_1 (N) int64 labels.

Until the set is complete, its blocks are files in FILE.npz.parts, each with its checksum in its name. The process that
finds all of them streams them into the archive, so that memory does not grow with N. It writes FILE.npz.json (as
samples.json for a folder), renames the archive into place, and removes the parts. The archive's bytes depend on the
images alone: nothing is compressed, and dates are fixed.
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
    """Writes FILE.npz and FILE.npz.json, by way of FILE.npz.parts."""

    def __init__(self, out: Path, description: dict[str, Any], labels: Labels) -> None:
        super().__init__(out, out.with_name(f"{out.name}.parts"), description, labels)
        self.final_description = out.with_name(f"{out.name}.json")
        self._parts: dict[int, str] = {}  # number -> file name, when the folder was last listed
        self._listed_at = -math.inf

    def is_complete(self) -> bool:
        if not self.out.exists():
            return False
        final = read_description(self.final_description)
        if final is None:
            raise RequestError(f"--out {self.out}: exists, but {self.final_description.name} does not")
        self._check_same(final)
        if final.get(CRC) != _crc(self.out):
            raise RequestError(f"--out {self.out}: is not the file that {self.final_description.name} describes")
        return True

    def has_block(self, number: int) -> bool:
        """The folder is listed at most every LOOK_EVERY seconds, so a part that another process made may be missed for
        so long. A part that was removed is noticed at once."""
        if self._has_part(number):
            return True
        if number not in self._parts and time.monotonic() - self._listed_at < LOOK_EVERY:
            return False
        with suppress(FileNotFoundError):  # others finished; `write` notices that
            self._list_parts()
        return self._has_part(number)

    def count_done(self) -> int:
        try:
            parts = self._list_parts()
        except FileNotFoundError:  # others finished
            return int(self.description["num"])
        return sum(len(rows) for number, rows in enumerate(self.blocks) if number in parts)

    def _is_own(self, name: str) -> bool:
        return name == JOB or _number(name) is not None

    def _has_part(self, number: int) -> bool:
        """Whether a listed part of this block still exists."""
        return number in self._parts and (self.place / self._parts[number]).exists()

    def _list_parts(self) -> dict[int, str]:
        """Number -> file name of the parts in the folder; of several for one block, the first name. FileNotFoundError
        if others finished."""
        self._parts, self._listed_at = {}, time.monotonic()
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
            if number not in self._list_parts():  # keep the first: another machine's bytes may differ
                self._rename(half, self.place / name)
                self._parts[number] = name

    def _complete(self) -> bool:
        # All parts, and space for the archive beside them.
        parts = self._list_parts()
        if not all(number in parts for number in range(len(self.blocks))):
            return False
        if shutil.disk_usage(self.place).free < self.bytes_needed(self.description["num"]):
            raise OSError(errno.ENOSPC, "no space left")
        # Assemble the archive in the work folder. A damaged part is removed, to be made again.
        half = self._half(self.out.name)
        try:
            self._assemble(half, [self.place / parts[number] for number in range(len(self.blocks))])
        except _DamagedPart as damaged:
            logger.warning("%s does not match its checksum and is made again", damaged.path)
            damaged.path.unlink(missing_ok=True)
            return False
        fsync(half)
        # The description first: an archive without one would be refused as a foreign file.
        final = {**ended(self.description, self.labels), CRC: _crc(half)}
        self._put(self.final_description, lambda path: write_json(path, final))
        self._rename(half, self.out)
        return True

    def _assemble(self, path: Path, parts: list[Path]) -> None:
        """Write the archive at `path`, block by block."""
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
    """A part whose content does not match the checksum in its name."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.path = path


def _checked(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The images of a part; _DamagedPart if they do not match."""
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != path.name.split(".")[1]:
        raise _DamagedPart(path)
    array: np.ndarray = np.load(io.BytesIO(data), allow_pickle=False)
    if array.dtype != np.uint8 or array.shape != shape:
        raise _DamagedPart(path)
    return array


def _number(name: str) -> int | None:
    """The block number in a part's file name; None for other names."""
    match = _PART.fullmatch(name)
    return int(match[1]) if match else None


def _crc(path: Path) -> str | None:
    """The CRC-32 of the images in the archive's directory; None if it is not an archive with images."""
    try:
        with zipfile.ZipFile(path) as archive:
            return f"{archive.getinfo(f'{IMAGES}.npy').CRC:08x}"
    except (OSError, zipfile.BadZipFile, KeyError):
        return None
