"""What reading an image file may cost, whatever the file claims: pixels, bytes of header, TIFF tags. And whose fault
it is when it cannot be read.

Pillow's own guard against bombs is a global of the whole process (`Image.MAX_IMAGE_PIXELS`) that any library may
change, and half of it is a warning. It is asked from several places: opening, a GIF's frames, a TIFF's tiles, every
crop. Within `pixels_at_most` the thread that reads is judged by its own limit at each of them; all other callers of
Pillow get Pillow's answer, and the global is neither read nor written here.
"""

import errno
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, NoReturn

from PIL import Image

from ldit.errors import RunError

LONGEST = 64
"""Long side over short side: 1 x 5000 enlarged to a short side of 256 would be 1.3 million pixels wide."""
_TAG_VALUES = 1 << 20  # values of a TIFF tag: each becomes a Python object, or a strip to decode
_TAGS = 4096
_STRIPS, _TILES, _TILE_WIDTH, _TILE_LENGTH = 273, 324, 322, 323
_WHOLE = {3: "H", 4: "L", 16: "Q"}  # TIFF types SHORT, LONG, LONG8
_BYTES = (1, 2, 7)  # TIFF types that stay bytes: BYTE, ASCII, UNDEFINED
# What a name answers that leads to no file. Everything else is an answer of the machine or the network, of a limit or a
# permission: it says nothing about what a file holds, and may be another one in a minute.
_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO)
_thread = threading.local()


class BadImage(Exception):
    """A file that is no image, or one that cannot or must not be decoded; str() is a short reason."""


def no_file(error: OSError) -> bool:
    """Whether there is no file, rather than one that cannot be read for now."""
    return error.errno in _NO_FILE


def unread(name: object, reason: str) -> RunError:
    """The error of an image that cannot be read for a reason that does not lie in it. `name` may be a file object,
    which then tells its name."""
    if hasattr(name, "read"):
        name = getattr(name, "name", "in memory")
    return RunError(f"cannot read image {name}: {reason}")


def judge(width: int, height: int, max_pixels: int) -> None:
    """BadPicture for an image that is too large or too long."""
    _judge_pixels(width, height, max_pixels)
    if max(width, height) > LONGEST * min(width, height):
        raise BadImage(f"{width} x {height}: the long side is more than {LONGEST} times the short side")


def _judge_pixels(width: int, height: int, max_pixels: float) -> None:
    if width * height > max_pixels:
        raise BadImage(f"{width} x {height} = {width * height} pixels, more than max_pixels {max_pixels}")


@contextmanager
def pixels_at_most(most: float) -> Iterator[None]:
    """In this thread images of more than `most` pixels are bad wherever Pillow would look for bombs."""
    before = getattr(_thread, "most", None)
    _thread.most = most
    try:
        yield
    finally:
        _thread.most = before


_pillows_check = Image._decompression_bomb_check


def _check(size: tuple[int, int]) -> None:
    most = getattr(_thread, "most", None)
    if most is None:
        _pillows_check(size)
    else:
        _judge_pixels(size[0], size[1], most)


Image._decompression_bomb_check = _check


class Metered:
    """A file of which at most `left` bytes are read; BadPicture at the first one more. A read that fails is RunError at
    once: some of Pillow's readers take an OSError for the end of the file.

    Pillow copies chunks, segments and tags into memory before it knows the image's size, and a TIFF may name the same
    megabytes in every one of 65535 tags.
    """

    def __init__(self, file: IO[bytes], left: int) -> None:
        self.file, self.left = file, left

    def read(self, size: int = -1) -> bytes:
        if size is None or size < 0 or size > self.left:
            size = self.left + 1
        try:
            data = self.file.read(size)
        except OSError as error:
            raise unread(self.file, error.strerror or str(error)) from None
        self.left -= len(data)
        if self.left < 0:
            raise BadImage("its header or what surrounds its pixels is too long")
        return data

    def fileno(self) -> NoReturn:
        """None: libtiff would read the file behind Python's back, and call a failing disk a damaged image."""
        raise OSError("metered")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def check_tiff(file: IO[bytes], max_pixels: int) -> None:
    """BadPicture when the first directory of a TIFF claims lists or tiles that do not belong to an image."""
    file.seek(0)
    head = file.read(16)
    order, big = "<" if head[:2] == b"II" else ">", 43 in head[2:4]
    tile = {_TILE_WIDTH: 0, _TILE_LENGTH: 0}
    try:
        (at,) = struct.unpack_from(order + ("Q" if big else "L"), head, 8 if big else 4)
        file.seek(at)
        (count,) = struct.unpack(order + ("Q" if big else "H"), file.read(8 if big else 2))
        if count > _TAGS:
            raise BadImage(f"a TIFF directory with {count} tags")
        entry = struct.Struct(order + ("HHQ8s" if big else "HHL4s"))
        for tag, kind, values, raw in entry.iter_unpack(file.read(count * entry.size)):
            if values > _TAG_VALUES and (kind not in _BYTES or tag in (_STRIPS, _TILES)):
                raise BadImage(f"TIFF tag {tag} claims {values} values")
            if tag in tile and kind in _WHOLE:
                (tile[tag],) = struct.unpack_from(order + _WHOLE[kind], raw)
    except (struct.error, OverflowError, OSError, ValueError) as error:
        raise BadImage("its TIFF directory is truncated or damaged") from error
    width, length = tile.values()
    if width * length > max_pixels:
        raise BadImage(f"TIFF tiles of {width} x {length} pixels, more than max_pixels {max_pixels}")
