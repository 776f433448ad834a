"""Reading and writing .npz files: nothing is unpickled, and nothing is allocated that a file merely claims.

An .npz is a zip of .npy members: a header of dtype and shape, then the numbers. What the header says must be the
size of the member, the size of the member must fit its packed size, and that the file.
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
from ldit.storage.atomic import replaced

IMAGES, LABELS = "arr_0", "arr_1"
MOST_BYTES = 1 << 30  # of an array that is held whole
MOST_SIDE = 4096  # pixels
_HEADER = 1 << 14  # bytes; numpy's own are 128
_LENGTHS = {(1, 0): 2, (2, 0): 4}  # bytes of the header's length, by version
_KIND = re.compile(r"[<>|=]?[a-zA-Z][0-9]{0,9}")
_DEFLATE = 1032  # the most bytes that deflate makes of one
_SUFFIX = ".npy"
_DATE = (1980, 1, 1, 0, 0, 0)  # the zip format's first: the same arrays make the same bytes on every day


@dataclass(frozen=True)
class Member:
    """An array in a file: what its header says, checked against its size."""

    path: Path
    info: zipfile.ZipInfo
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran: bool
    start: int
    """Bytes of header."""

    @property
    def key(self) -> str:
        return self.info.filename.removesuffix(_SUFFIX)

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def refuse(self, reason: str) -> EvaluationError:
        return EvaluationError(f"{self.path}: {self.key} {reason}")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What zipfile, zlib and numpy raise on a damaged file, as one line."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, struct.error, ValueError, RuntimeError) as error:
        raise EvaluationError(f"{path} is damaged or no .npz file: {error}") from None
    except OSError as error:
        raise EvaluationError(f"cannot read {path}: {error.strerror or error}") from None


def members(path: Path) -> dict[str, Member]:
    """Key -> array of a file, of which the headers alone are read. EvaluationError in one line when it is missing, no
    .npz file, truncated, holds Python objects, or says something of itself that does not fit."""
    arrays: dict[str, Member] = {}
    with _reading(path), zipfile.ZipFile(path) as archive:
        size = path.stat().st_size
        for info in archive.infolist():
            member = _member(path, archive, info, size)
            if member.key in arrays:
                raise member.refuse("is there twice")
            arrays[member.key] = member
    return arrays


def _member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, size: int) -> Member:
    name = info.filename
    if not name.endswith(_SUFFIX):
        raise EvaluationError(f"{path} is no .npz file: it holds {name}")
    if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise EvaluationError(f"{path}: {name} is encrypted or packed in a way numpy does not write")
    # The claimed size must be one that the packed bytes can have, and these must be in the file.
    most = info.compress_size * (1 if info.compress_type == zipfile.ZIP_STORED else _DEFLATE)
    if info.file_size > most or info.header_offset + info.compress_size > size:
        raise EvaluationError(f"{path}: {name} cannot hold the {info.file_size} bytes that the file claims")
    # The header must claim as many bytes as the member has.
    with archive.open(info) as file:
        head = io.BytesIO(file.read(_HEADER))
    dtype, shape, fortran = _header(path, name, head)
    member = Member(path, info, dtype, shape, fortran, head.tell())
    if dtype.hasobject:
        raise member.refuse("holds Python objects, which are not read")
    if any(axis < 0 for axis in shape) or member.start + member.bytes != info.file_size:
        raise member.refuse(f"says {dtype} {shape} and has {info.file_size - member.start} bytes")
    return member


def _header(path: Path, name: str, file: io.BytesIO) -> tuple[np.dtype[Any], tuple[int, ...], bool]:
    """What a .npy header says, parsed as a literal; the file is at its end then."""
    magic, version = file.read(6), tuple(file.read(2))
    if magic != b"\x93NUMPY" or version not in _LENGTHS:
        raise EvaluationError(f"{path}: {name} is no array in version 1.0 or 2.0 of the .npy format")
    length = int.from_bytes(file.read(_LENGTHS[version]), "little")
    text = file.read(length)
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
    """The whole array, in the machine's byte order; EvaluationError above 1 GiB."""
    if member.bytes > MOST_BYTES:
        raise member.refuse(f"has {member.bytes} bytes; arrays that are read whole go to {MOST_BYTES}")
    with _reading(member.path), zipfile.ZipFile(member.path) as archive, archive.open(member.info) as file:
        _exactly(file, member.start)
        flat = np.frombuffer(_exactly(file, member.bytes), member.dtype)
    array = flat.reshape(member.shape, order="F" if member.fortran else "C")
    return array.astype(member.dtype.newbyteorder("="), copy=False)


def _exactly(file: IO[bytes], count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise EOFError(f"{count - len(data)} bytes are missing")
    return data


class Images:
    """uint8 images (N, H, W, 3) in a member of an .npz file, never read whole. EvaluationError names what is wrong.

    A member that is stored is read from any image on at once; one that is packed is unpacked from its first. The
    checksum is compared at the end of a pass from the first to the last; who reads parts alone calls `verify`.
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
        """Whether reading may begin at any image at no cost."""
        return self.member.info.compress_type == zipfile.ZIP_STORED

    def verify(self) -> None:
        """Compare the checksum of all images: a pass at the speed of the disk, some GB a second at most; a packed
        member is unpacked for it. Memory is that of 4 MiB."""
        path, info = self.member.path, self.member.info
        with _reading(path), zipfile.ZipFile(path) as archive, archive.open(info) as file:
            while file.read(1 << 22):
                pass

    def batches(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[np.ndarray]:
        """uint8 (at most size, H, W, 3) in order, of the images start to stop; memory is that of one batch."""
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
                if offset and self.stored:
                    file: IO[bytes] = stack.enter_context(member.path.open("rb"))
                    file.seek(info.header_offset)
                    local = _exactly(file, 30)  # of a local header; its last two numbers are lengths of what follows
                    file.seek(sum(struct.unpack("<HH", local[26:])) + member.start + offset, io.SEEK_CUR)
                else:
                    file = stack.enter_context(stack.enter_context(zipfile.ZipFile(member.path)).open(info))
                    left = member.start + offset
                    while left:
                        left -= len(_exactly(file, min(left, 1 << 20)))
            yield file


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Arrays in the order given: whole under their name or not at all, the same bytes for the same arrays.
    EvaluationError when the file cannot be written."""
    try:
        with replaced(path) as temporary, zipfile.ZipFile(temporary, "x", zipfile.ZIP_STORED) as archive:
            for key, array in arrays.items():
                plain = np.ascontiguousarray(array)
                write_member(archive, key, plain.dtype, plain.shape, [plain])
    except OSError as error:
        raise EvaluationError(f"cannot write {path}: {error.strerror or error}") from None


def write_member(
    archive: zipfile.ZipFile, key: str, dtype: np.dtype[Any], shape: tuple[int, ...], parts: Iterable[np.ndarray]
) -> None:
    """An array as a member of an archive, whose rows come in parts; with 64-bit sizes and a fixed date whatever it is.
    ValueError where the parts are not as many numbers as the shape says."""
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
