"""PNG files cut down to their pixels, because Pillow refuses a file for faults in chunks that nobody needs."""

import zlib
from collections.abc import Iterator

from ldit.data.images.limits import MOST_EXIF, BadImage

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_MOST_CHUNKS = 1 << 17
_TRANSPARENCY = b"tRNS"  # the only ancillary chunk that pixels depend on
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_ORIENTATION_TEXTS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")  # where programs write an EXIF orientation


def pixels_only(data: bytes) -> tuple[bytes, bool]:
    """(the file without ancillary chunks, whether it is animated).

    Kept are critical chunks, transparency, and sound chunks that may hold the EXIF orientation. Colour profiles, gamma,
    texts, times and animation frames go, sound or damaged. A file that breaks off is returned up to its end: its
    decoder says so. BadImage for a file of too many pieces.
    """
    view, kept, frames = memoryview(data), [(0, len(SIGNATURE))], 0
    for count, (kind, start, end) in enumerate(_chunks(data), 1):
        if count > _MOST_CHUNKS:
            raise BadImage(f"its chunks are too many: more than {_MOST_CHUNKS}")
        if kind == b"acTL" and end - start >= 20:
            frames = int.from_bytes(view[start + 8 : start + 12], "big")
        if not (kind[0] & 32) or kind == _TRANSPARENCY or _may_orient(kind, view[start:end]):
            kept.append((start, end))
    if sum(end - start for start, end in kept) == len(data):
        return data, frames > 1
    return b"".join(view[start:end] for start, end in kept), frames > 1


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(type, start, end) of each chunk to the last one; what is no chunk is the rest of the file, as if critical."""
    at = len(SIGNATURE)
    while at < len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        end = at + 12 + length
        if end > len(data) or not kind.isalpha():
            yield b"IDAT", at, len(data)
            return
        yield kind, at, end
        if kind == b"IEND":
            return
        at = end


def _may_orient(kind: bytes, chunk: memoryview) -> bool:
    """Whether an ancillary chunk may hold an EXIF orientation, and is sound and small."""
    if kind != b"eXIf" and kind not in _TEXTS:
        return False
    if len(chunk) > MOST_EXIF or zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:], "big"):
        return False
    body = bytes(chunk[8:-4])
    if kind == b"eXIf":
        return True
    keyword, _, rest = body.partition(b"\0")
    if keyword + b"\0" not in _ORIENTATION_TEXTS:
        return False
    # Texts may be packed: those that unpack to more than an EXIF block go.
    packed = b""
    if kind == b"zTXt":
        packed = rest[1:]
    elif kind == b"iTXt" and rest[:1] == b"\1":
        packed = rest[2:].split(b"\0", 2)[-1]
    try:
        unpacker = zlib.decompressobj()
        unpacker.decompress(packed, MOST_EXIF)
        return not unpacker.unconsumed_tail
    except zlib.error:
        return False
