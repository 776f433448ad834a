"""Limits of image files (pixels, bytes of file and header), and which read errors are the machine's fault."""

import errno
from io import BytesIO

from ldit.errors import RunError

LONGEST = 64
"""Long side over short side: 1 x 5000 enlarged to a short side of 256 would be 1.3 million pixels wide."""
MOST_BYTES = 1 << 28
"""Bytes of a file: it is held in memory while it is decoded."""
MOST_HEADER = 8 << 20
"""Bytes that may be read before the pixels: comments, profiles, tags."""
MOST_EXIF = 1 << 16
"""Bytes of an EXIF block: it fits one JPEG segment. Pillow copies everything that each of its tags names."""
_LEAST_READ = 1024  # bytes that the shortest read counts as: a header of many tiny pieces takes time instead of memory
# Errors that mean that there is no such file. All others come from the machine, the network, a limit or a permission:
# they say nothing about the content of a file, and may be gone in a minute.
_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO)


class BadImage(Exception):
    """A file that is no image, or that cannot or must not be decoded; its text is a short reason."""


class HeaderLimit(BytesIO):
    """A file in memory. Until `lift`, reading more than MOST_HEADER bytes of it raises BadImage.

    Pillow copies chunks, segments and tags before it knows the image's size, and a TIFF may name the same megabytes in
    every one of 65535 tags. Reading the whole rest at once, as for WebP, does not count: it is in memory already.
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
        """Remove the limit, once the size of the image is known and allowed."""
        self._left = float("inf")


def check_size(width: int, height: int, max_pixels: int) -> None:
    """BadImage for an image that has too many pixels, or is too long for its width."""
    if width * height > max_pixels:
        raise BadImage(f"{width} x {height} = {width * height} pixels, more than max_pixels {max_pixels}")
    if max(width, height) > LONGEST * min(width, height):
        raise BadImage(f"{width} x {height}: the long side is more than {LONGEST} times the short side")


def no_file(error: OSError) -> bool:
    """Whether the error means that there is no such file, not that the machine cannot read it for now."""
    return error.errno in _NO_FILE


def unread(name: object, reason: str) -> RunError:
    """The error for an image that the machine cannot read. `name` is its path, or a file object that has a name."""
    if hasattr(name, "read"):
        name = getattr(name, "name", "in memory")
    return RunError(f"cannot read image {name}: {reason}")
