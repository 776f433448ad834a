"""Image files byte by byte: headers that claim any size, with little behind them."""

import struct
import zlib
from io import BytesIO

from PIL import Image


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">L", len(body)) + name + body + struct.pack(">L", zlib.crc32(name + body))


def png(width: int, height: int, extra: bytes = b"", pixels: bytes = b"") -> bytes:
    """Grey."""
    head = chunk(b"IHDR", struct.pack(">LLBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def tiff(tags: list[tuple[int, int, int, int]], order: str = "<", rest: bytes = b"\0" * 64) -> bytes:
    """Tags (number, type, count, value), with the rest of the file after them."""
    body = b"".join(
        struct.pack(order + "HHL", *tag[:3])
        + struct.pack(order + ("HH" if tag[1] == 3 else "L"), tag[3], *[0] * (tag[1] == 3))
        for tag in tags
    )
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "LH", 8, len(tags))
    return head + body + b"\0" * 4 + rest


def plain_tiff(width: int, height: int, *more: tuple[int, int, int, int], rest: bytes = b"\0" * 64) -> bytes:
    """Grey, 8 bits, uncompressed, one strip at byte 8."""
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8)]
    replaced = {tag[0]: tag for tag in tags} | {tag[0]: tag for tag in more}
    return tiff([replaced[number] for number in sorted(replaced)], rest=rest)


def gif(width: int, height: int, frame: tuple[int, int] = (1, 1), disposal: int = 0, extra: bytes = b"") -> bytes:
    screen = b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0)
    control = b"!\xf9\x04" + bytes([disposal << 2, 0, 0, 0, 0])
    return screen + extra + control + b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\x02\x02\x4c\x01\0;"


def webp(width: int, height: int, kind: bytes = b"VP8L") -> bytes:
    if kind == b"VP8L":
        body = b"\x2f" + struct.pack("<L", (width - 1) | (height - 1) << 14) + b"\0" * 33
    elif kind == b"VP8X":
        body = b"\x10\0\0\0" + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
        inner = b"\x2f" + struct.pack("<L", (width - 1) & 16383 | ((height - 1) & 16383) << 14) + b"\0" * 33
        body += b"VP8L" + struct.pack("<L", len(inner)) + inner
        return b"RIFF" + struct.pack("<L", len(body) + 12) + b"WEBPVP8X" + struct.pack("<L", 10) + body
    else:
        body = b"\x30\x01\0\x9d\x01\x2a" + struct.pack("<HH", width, height) + b"\0" * 40
    return b"RIFF" + struct.pack("<L", len(body) + 12) + b"WEBP" + kind + struct.pack("<L", len(body)) + body


def bmp(width: int, height: int, bits: int = 24, packing: int = 0) -> bytes:
    head = struct.pack("<LllHHLLllLL", 40, width, height, 1, bits, packing, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<LHHL", 200, 0, 0, 54) + head + b"\0" * 146


def jpeg(width: int, height: int, extra: bytes = b"") -> bytes:
    """A true JPEG whose frame header claims another size."""
    file = BytesIO()
    Image.new("L", (8, 8), 9).save(file, "JPEG")
    data = file.getvalue()
    at = data.index(b"\xff\xc0")
    return data[:2] + extra + data[2 : at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]


def claims(kind: str, width: int, height: int) -> bytes:
    """A file whose header claims this size, and little else."""
    match kind:
        case "PNG":
            return png(width, height)
        case "TIFF":
            return plain_tiff(width, height)
        case "PPM":
            return f"P6 {width} {height} 255\n".encode() + b"\0" * 64
    return {"JPEG": jpeg, "WEBP": webp, "BMP": bmp, "GIF": gif}[kind](width, height)
