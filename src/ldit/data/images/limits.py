"""What reading an image file may cost: pixels, bytes of file and header; and which failures are the machine's."""

import errno
from io import BytesIO

from ldit.errors import RunError

LONGEST = 64
"""Long side over short side: 1 x 5000 enlarged to a short side of 256 would be 1.3 million pixels wide."""
MOST_BYTES = 1 << 28
"""Of a file: it is held in memory while it is decoded."""
MOST_HEADER = 8 << 20
"""Bytes that may be read before the pixels: comments, profiles, tags."""
MOST_EXIF = 1 << 16
"""Bytes of an EXIF block: it fits one JPEG segment. Pillow copies out all that each of its tags names."""
_LEAST_READ = 1024  # what the shortest read counts as: a header of many tiny pieces costs time instead of memory
# What a name answers that leads to no file. Everything else is an answer of the machine or the network, of a limit or a
# permission: it says nothing about what a file holds, and may be another one in a minute.
_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO)


class BadImage(Exception):
    """A file that is no image, or one that cannot or must not be decoded; str() is a short reason."""


class HeaderLimit(BytesIO):
    """A file in memory of which MOST_HEADER bytes may be read, then BadImage; all of it after `lift`.

    Pillow copies chunks, segments and tags before it knows the image's size, and a TIFF may name the same megabytes in
    every one of 65535 tags. Reading all that is left at once, as for WebP, is free: it is in memory already.
    """

    _left: float = MOST_HEADER

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        if size is not None and size >= 0:
            self._left -= max(len(data), _LEAST_READ)
            if self._left < 0:
                raise BadImage(f"its header is too long: more than {MOST_HEADER >> 20} MiB, or of too many pieces")
        return data

    def lift(self) -> None:
        """End the limit: the size of the image is known and allowed."""
        self._left = float("inf")


def check_size(width: int, height: int, max_pixels: int) -> None:
    """BadImage for an image that is too large or too long."""
    if width * height > max_pixels:
        raise BadImage(f"{width} x {height} = {width * height} pixels, more than max_pixels {max_pixels}")
    if max(width, height) > LONGEST * min(width, height):
        raise BadImage(f"{width} x {height}: the long side is more than {LONGEST} times the short side")


def no_file(error: OSError) -> bool:
    """Whether there is no file, rather than one that cannot be read for now."""
    return error.errno in _NO_FILE


def unread(name: object, reason: str) -> RunError:
    """The error of an image that cannot be read for a reason that does not lie in it. `name` is its path, or a file
    object that has one."""
    if hasattr(name, "read"):
        name = getattr(name, "name", "in memory")
    return RunError(f"cannot read image {name}: {reason}")
