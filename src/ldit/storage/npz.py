"""Reads and writes .npz files; nothing is unpickled, and sizes are checked before memory is allocated.

An .npz is a zip of .npy members: a header with dtype and shape, then the numbers. The size by the header must equal the
member's size, which must be possible for its compressed size, which must fit into the file.
"""

import ast
import io
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from ldit.errors import EvaluationError
from ldit.storage.outputs import whole
from ldit.storage.strange import what_is_it

IMAGES, LABELS = "arr_0", "arr_1"
MOST_BYTES = 1 << 30  # of an array that is read into memory at once
MOST_SIDE = 4096  # pixels
_HEADER = 1 << 14  # bytes; numpy's own are 128
_LENGTHS = {(1, 0): 2, (2, 0): 4}  # bytes of the header's length, by version
_KIND = re.compile(r"[<>|=]?[a-zA-Z][0-9]{0,9}")
_DEFLATE = 1032  # the largest possible ratio of deflate
_SUFFIX = ".npy"
_DATE = (1980, 1, 1, 0, 0, 0)  # the earliest date of zip: a fixed one, so that the same arrays give the same bytes


@dataclass(frozen=True)
class Member:
    """An array in a file, by its header, whose size has been checked."""

    path: Path
    info: zipfile.ZipInfo
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran: bool
    start: int
    """Size of the header in bytes."""

    @property
    def key(self) -> str:
        return self.info.filename.removesuffix(_SUFFIX)

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def refuse(self, reason: str) -> EvaluationError:
        """The error that names file, array and reason."""
        return EvaluationError(f"{self.path}: {self.key} {reason}")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn errors of zipfile, zlib and numpy on a damaged file into an EvaluationError of one line."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, struct.error, ValueError, RuntimeError) as error:
        why = what_is_it(path) or f"is damaged or no .npz file: {error}"
        raise EvaluationError(f"{path} {why}") from None
    except OSError as error:
        raise EvaluationError(f"cannot read {path}: {error.strerror or error}") from None


def members(path: Path) -> dict[str, Member]:
    """Key -> array of a file; only headers are read. EvaluationError when the file is missing, truncated, not an .npz,
    holds Python objects, or is inconsistent."""
    arrays: dict[str, Member] = {}
    with _reading(path), zipfile.ZipFile(path) as archive:
        size = path.stat().st_size
        for info in archive.infolist():
            member = _member(path, archive, info, size)
            if member.key in arrays:
                raise member.refuse("occurs twice")
            arrays[member.key] = member
    return arrays


def _member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, size: int) -> Member:
    """An array of the archive; EvaluationError for one that cannot be read safely. `size` is that of the file."""
    name = info.filename
    if not name.endswith(_SUFFIX):
        raise EvaluationError(f"{path} is no .npz file: it holds {name}")
    if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise EvaluationError(f"{path}: {name} is encrypted or packed in a way numpy does not write")
    # The stated size must be possible for the compressed bytes, and these must be in the file.
    most = info.compress_size * (1 if info.compress_type == zipfile.ZIP_STORED else _DEFLATE)
    if info.file_size > most or info.header_offset + info.compress_size > size:
        raise EvaluationError(f"{path}: {name} cannot hold the {info.file_size} bytes that the file states")
    # The header must describe as many bytes as the member has.
    with archive.open(info) as file:
        head = io.BytesIO(file.read(_HEADER))
    dtype, shape, fortran = _header(path, name, head)
    member = Member(path, info, dtype, shape, fortran, head.tell())
    if dtype.hasobject:
        raise member.refuse("holds Python objects, which are not read")
    if any(axis < 0 for axis in shape) or member.start + member.bytes != info.file_size:
        raise member.refuse(f"states {dtype} {shape} but has {info.file_size - member.start} bytes")
    return member


def _header(path: Path, name: str, file: io.BytesIO) -> tuple[np.dtype[Any], tuple[int, ...], bool]:
    """(dtype, shape, Fortran order) of a .npy header; leaves `file` at the header's end."""
    # Version and length.
    magic, version = file.read(6), tuple(file.read(2))
    if magic != b"\x93NUMPY" or version not in _LENGTHS:
        raise EvaluationError(f"{path}: {name} is no array in version 1.0 or 2.0 of the .npy format")
    length = int.from_bytes(file.read(_LENGTHS[version]), "little")
    text = file.read(length)
    # A Python dictionary, parsed as a literal, never evaluated.
    try:
        header = ast.literal_eval(text.decode("latin1").strip())
        kind, fortran, shape = (header[key] for key in ("descr", "fortran_order", "shape"))
        if len(text) < length or type(fortran) is not bool or type(shape) is not tuple or type(kind) is not str:
            raise ValueError
        if not all(type(axis) is int for axis in shape) or not _KIND.fullmatch(kind):
            raise ValueError
        return np.dtype(kind), shape, fortran
    except (ValueError, SyntaxError, TypeError, KeyError, IndexError, MemoryError, RecursionError):
        raise EvaluationError(f"{path}: the header of {name} is damaged, or of no plain array") from None


def read_array(member: Member) -> np.ndarray:
    """The full array, in the machine's byte order; EvaluationError above 1 GiB."""
    if member.bytes > MOST_BYTES:
        raise member.refuse(f"has {member.bytes} bytes; at most {MOST_BYTES} can be read at once")
    with _reading(member.path), zipfile.ZipFile(member.path) as archive, archive.open(member.info) as file:
        _exactly(file, member.start)
        flat = np.frombuffer(_exactly(file, member.bytes), member.dtype)
    array = flat.reshape(member.shape, order="F" if member.fortran else "C")
    return array.astype(member.dtype.newbyteorder("="), copy=False)


def _exactly(file: IO[bytes], count: int) -> bytes:
    """The next `count` bytes; EOFError if there are fewer."""
    data = file.read(count)
    if len(data) != count:
        raise EOFError(f"{count - len(data)} bytes are missing")
    return data


class Images:
    """uint8 images (N, H, W, 3) in a member of an .npz file, read in batches. EvaluationError names what is wrong.

    Reading can start at any image of an uncompressed member; a compressed one is decompressed from its beginning. The
    checksum is compared at the end of a pass over all images; call `verify` when only a part is read.
    """

    def __init__(self, member: Member) -> None:
        sides = member.shape[1:]
        if member.dtype != np.uint8 or len(member.shape) != 4 or sides[-1] != 3 or member.fortran:
            order = " in Fortran order" if member.fortran else ""
            raise member.refuse(f"is {member.dtype} {member.shape}{order}; images are uint8 (N, height, width, 3)")
        if not all(1 <= side <= MOST_SIDE for side in sides[:2]):
            raise member.refuse(f"holds images of {sides[0]} x {sides[1]}; sides go from 1 to {MOST_SIDE}")
        self.member, self._count = member, member.shape[0]
        self.shape: tuple[int, int, int] = (sides[0], sides[1], 3)

    def __len__(self) -> int:
        return self._count

    @property
    def stored(self) -> bool:
        """Whether the member is uncompressed, so that reading can start at any image at no cost."""
        return self.member.info.compress_type == zipfile.ZIP_STORED

    def verify(self) -> None:
        """Compare the checksum: one pass over all images, in pieces of 4 MiB."""
        path, info = self.member.path, self.member.info
        with _reading(path), zipfile.ZipFile(path) as archive, archive.open(info) as file:
            while file.read(1 << 22):
                pass

    def batches(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """Yields images start to stop in order, as uint8 (b, H, W, 3) with b at most `size`, one batch in memory."""
        stop = self._count if stop is None else min(stop, self._count)
        if start >= stop:
            return
        one, path = math.prod(self.shape), self.member.path
        with self._from(start * one) as file:
            for first in range(start, stop, size):
                count = min(size, stop - first)
                with _reading(path):
                    data = _exactly(file, count * one)
                yield np.frombuffer(data, np.uint8).reshape(count, *self.shape)

    @contextmanager
    def _from(self, offset: int) -> Iterator[IO[bytes]]:
        """The member's file, `offset` bytes after its header."""
        member, info = self.member, self.member.info
        with ExitStack() as stack:
            with _reading(member.path):
                # Uncompressed: seek past the member's local zip header, whose last two numbers are the lengths of name
                # and extra field.
                if offset and self.stored:
                    file: IO[bytes] = stack.enter_context(member.path.open("rb"))
                    file.seek(info.header_offset)
                    local = _exactly(file, 30)
                    file.seek(sum(struct.unpack("<HH", local[26:])) + member.start + offset, io.SEEK_CUR)
                # Compressed: read and drop everything before.
                else:
                    file = stack.enter_context(stack.enter_context(zipfile.ZipFile(member.path)).open(info))
                    left = member.start + offset
                    while left:
                        left -= len(_exactly(file, min(left, 1 << 20)))
            yield file


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays in the given order, whole or not at all; the same arrays give the same bytes. RunError when the file
    cannot be written."""
    needs = sum(array.nbytes for array in arrays.values())
    with whole(path, needs) as temporary, zipfile.ZipFile(temporary, "x", zipfile.ZIP_STORED) as archive:
        for key, array in arrays.items():
            plain = np.ascontiguousarray(array)
            write_member(archive, key, plain.dtype, plain.shape, [plain])


def write_member(
    archive: zipfile.ZipFile, key: str, dtype: np.dtype[Any], shape: tuple[int, ...], parts: Iterable[np.ndarray]
) -> None:
    """Write an array, whose rows come in parts, as a member of an archive. Sizes are always 64-bit and the date is
    fixed, so that the bytes depend on the array alone. ValueError when the parts do not fill the shape."""
    info = zipfile.ZipInfo(key + _SUFFIX, _DATE)
    info.create_system, info.external_attr = 3, 0o644 << 16
    with archive.open(info, "w", force_zip64=True) as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        left = math.prod(shape) * dtype.itemsize
        for part in parts:
            left -= file.write(np.ascontiguousarray(part).data.cast("B"))
    if left:
        raise ValueError(f"{key}: {left} bytes fewer than {dtype} {shape} has")


def open_images(path: Path) -> Images:
    """The images of an .npz file of samples, arr_0; EvaluationError when it has none."""
    arrays = members(path)
    if IMAGES not in arrays:
        raise EvaluationError(f"{path} has no {IMAGES}, images: it holds {', '.join(arrays) or 'nothing'}")
    return Images(arrays[IMAGES])
