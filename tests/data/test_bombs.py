"""Row D4 of the reliability table, files: images that claim or unpack to far more than they should cost little."""

import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from counts import count
from data.image_files import bmp, chunk, gif, jpeg, plain_tiff, png, tiff, webp

from ldit.data.images.decoding import BadImage, Decoding, open_image


def inflating(size: int) -> bytes:
    """`size` zeros, compressed, without holding them."""
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(size >> 20)) + packer.flush()


def bombs() -> dict[str, bytes]:
    huge, packed = 2**31 - 1, inflating(1 << 26)
    text = chunk(b"zTXt", b"a\0\0" + packed)
    many = chunk(b"zTXt", b"a\0\0" + inflating(1 << 20)) * 200
    app = b"\xff\xe3\xff\xff" + bytes(65533)
    comment = b"!\xfe" + (b"\xff" + b"c" * 255) * 40000 + b"\0"
    wide = b"\0" * (8 << 20)
    same = [(1000 + i, 7, len(wide), 200) for i in range(4000)]  # each tag names the same 8 MB
    size = [(256, 4, 1, 4), (257, 4, 1, 4)]
    big = b"II+\0" + struct.pack("<HHQQ", 8, 0, 16, 2**62) + b"\0" * 64
    return {
        "square.png": png(65535, 65535),
        "most.png": png(huge, huge),
        "line.png": png(huge, 1),
        "ztxt.png": png(2, 2, text, b"\0" * 6),
        "itxt.png": png(2, 2, chunk(b"iTXt", b"a\0\1\0\0\0" + packed), b"\0" * 6),
        "many.png": png(2, 2, many, b"\0" * 6),
        "iccp.png": png(2, 2, chunk(b"iCCP", b"a\0\0" + packed), b"\0" * 6),
        "length.png": png(2, 2)[:33] + struct.pack(">L", huge) + b"tEXt" + b"a" * 100,
        "square.bmp": bmp(65535, 65535),
        "most.bmp": bmp(huge, huge),
        "down.bmp": bmp(40000, -40000),
        "rle.bmp": bmp(40000, 40000, 8, 1),
        "square.tiff": plain_tiff(65535, 65535),
        "most.tiff": plain_tiff(huge, huge),
        "deflate.tiff": plain_tiff(60000, 60000, (259, 3, 1, 8)),
        "strips.tiff": plain_tiff(8, 8, (273, 4, 1 << 28, 8)),
        "bytes.tiff": plain_tiff(8, 8, (273, 1, 1 << 28, 8)),
        "bits.tiff": plain_tiff(8, 8, (258, 3, 1 << 28, 8)),
        "tags.tiff": tiff([*size, *same], rest=wide),
        "more.tiff": tiff([*size, *same, *same]),
        "tiles.tiff": plain_tiff(8, 8, (322, 4, 1, 1 << 16), (323, 4, 1, 1 << 16), (324, 4, 1, 8), (259, 3, 1, 8)),
        "big.tiff": big,
        "screen.gif": gif(65535, 65535),
        "frame.gif": gif(1, 1, (65535, 65535)),
        "disposed.gif": gif(1, 1, (65535, 65535), disposal=2),
        "comment.gif": gif(4, 4, extra=comment),
        "lossless.webp": webp(16384, 16384),
        "canvas.webp": webp(16384, 16384, b"VP8X"),
        "lossy.webp": webp(16383, 16383, b"VP8 "),
        "square.ppm": b"P6 65535 65535 255\n",
        "digits.ppm": b"P6 9999999999 9999999999 255\n",
        "endless.ppm": b"P6 " + b"9" * 100000,
        "comment.ppm": b"P6 #" + b"c" * (1 << 20),
        "deep.ppm": b"P5 60000 60000 65535\n",
        "plain.ppm": b"P3 60000 60000 255\n1 2 3",
        "square.jpg": jpeg(65535, 65535),
        "segments.jpg": jpeg(8, 8, app * 600),
    }


MEASURED = """
import json, re, resource, sys, time, warnings
from pathlib import Path
from ldit.data.images.decoding import BadImage, Decoding, examine
warnings.simplefilter("ignore")

def peak():  # bytes; Linux carries the other figure over from the process that started this one
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 1024 * int(re.search("VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

said = {}
for path in sorted(Path(sys.argv[1]).iterdir()):
    began = time.process_time()
    try:
        examine(path, Decoding(exif=True))
        reason = ""
    except BadImage as error:
        reason = str(error)
    said[path.name] = [reason, time.process_time() - began, peak()]
print(json.dumps(said))
"""


def measured(folder: Path) -> dict[str, tuple[str, float, float]]:
    """name -> (reason, seconds, peak GB so far), in a process of its own."""
    import json

    done = subprocess.run([sys.executable, "-c", MEASURED, str(folder)], capture_output=True, text=True, check=True)
    return {name: (said, seconds, peak / 1e9) for name, (said, seconds, peak) in json.loads(done.stdout).items()}


def test_bombs_are_refused_at_little_cost(tmp_path: Path) -> None:
    """Row D4, files: each refused with a reason, in less than 1 GB and quickly. What unpacks in a chunk that a PNG's
    pixels do not need is left packed."""
    files = bombs()
    assert len(files) >= 30
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    said = measured(tmp_path)
    harmless = {"iccp.png", "itxt.png", "many.png", "ztxt.png"}
    assert {name for name, (reason, _, _) in said.items() if reason} == set(files) - harmless, said
    assert max(peak for _, _, peak in said.values()) < 0.5, said
    assert max(seconds for _, seconds, _ in said.values()) < 10, said  # each well below a second on an idle machine
    for name, part in {
        "square": "65535 x 65535 = 4294836225 pixels, more than max_pixels",
        "line.png": "more than max_pixels",
        "frame.gif": "4294836225 pixels",
        "disposed.gif": "4294836225 pixels",
        "canvas.webp": "16384 x 16384",
        "lossless.webp": "16384 x 16384",
        "lossy.webp": "16383 x 16383",
        "tags.tiff": "its header is too long",
        "segments.jpg": "its header is too long",
        "comment": "its header is too long",
    }.items():
        assert all(part in reason for file, (reason, _, _) in said.items() if file.startswith(name)), (name, said)


def test_exif_that_names_itself_many_times_costs_little(tmp_path: Path) -> None:
    """4 MB of EXIF with 65000 tags of 4 MB each, and 64 kB with 5000 tags: 260 GB and 0.3 GB for a reader that copies
    them out. The first is not looked at."""
    for name, size, count_of_tags in (("a", 4 << 20, 65000), ("b", 65000, 5000)):
        tags = b"".join(struct.pack("<HHLL", i, 7, size - 8, 8) for i in range(count_of_tags) if i != 0x0112)
        orientation = struct.pack("<HHLHH", 0x0112, 3, 1, 6, 0)
        directory = b"II*\0" + struct.pack("<LH", 8, count_of_tags) + tags + orientation
        block = directory.ljust(size, b"\0")
        (tmp_path / f"{name}.png").write_bytes(png(2, 2, chunk(b"eXIf", block), b"\0" * 6))
    segment = b"\xff\xe1" + struct.pack(">H", 8 + len(block)) + b"Exif\0\0" + block
    (tmp_path / "c.jpg").write_bytes(jpeg(8, 8, segment))
    said = measured(tmp_path)
    assert all(not reason and seconds < 5 and peak < 0.5 for reason, seconds, peak in said.values()), said


def test_files_that_are_too_large(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(2, 2, b"", b"\0" * 6))
    os.truncate(path, (256 << 20) + 1)
    with pytest.raises(BadImage, match="the file is larger than 256 MiB"):
        open_image(path, Decoding())


def test_large_images_stay_below_a_gigabyte(tmp_path: Path) -> None:
    """64 million RGBA pixels (in the soak run; a quarter of them otherwise), and as many of 16 bits."""
    side = count(4096, 8192)
    rows = zlib.compress(bytes(side * 4 + 1) * side, 1)
    head = chunk(b"IHDR", struct.pack(">LLBBBBB", side, side, 8, 6, 0, 0, 0))
    body = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(body)
    deep = chunk(b"IHDR", struct.pack(">LLBBBBB", side, side, 16, 0, 0, 0, 0))
    rows = zlib.compress(bytes(side * 2 + 1) * side, 1)
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n" + deep + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    said = measured(tmp_path)
    assert all(not reason for reason, _, _ in said.values()), said
    # The decoded image and its RGB, 4 bytes a pixel each, and 0.1 GB for the program, the file and strips
    assert max(peak for _, _, peak in said.values()) < 2 * 4 * side**2 / 1e9 + 0.1, said
