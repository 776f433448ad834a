"""Row D1 of the reliability table: 400 damaged files among good ones; exactly those are found, by training and by
`ldit data check`. Damage is by construction: the full decode by Pillow alone raises, or a stated size rule fails."""

import os
import struct
import subprocess
import sys
import warnings
import zipfile
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from counts import count
from PIL import Image

from ldit.data.formats.image_folder import ImageFolder
from ldit.data.images.decoding import BadImage, Decoding, open_image
from ldit.data.scan import scan_folder
from ldit.errors import DataError, RunError

SIZE = 12
KINDS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "PPM": "ppm", "TIFF": "tiff", "GIF": "gif"}
TEXT = b"<html><body>404: this picture is gone</body></html>\n" * 5


def whole(kind: str, rng: np.random.Generator) -> tuple[bytes, np.ndarray]:
    """A good file of SIZE x SIZE and its pixels, as Pillow alone decodes them."""
    file = BytesIO()
    pixels = Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))
    pixels.save(file, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return file.getvalue(), np.asarray(Image.open(file).convert("RGB"))


def decodes(data: bytes) -> bool:
    """Whether Pillow alone makes an image of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            Image.open(BytesIO(data)).load()
        except Exception:
            return False
    return True


def truncated(data: bytes, rng: np.random.Generator) -> bytes:
    """Cut at a random place where Pillow alone notices."""
    while True:
        cut = data[: rng.integers(1, len(data))]
        if not decodes(cut):
            return cut


def zipped() -> bytes:
    file = BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("picture.jpg", TEXT)
    return file.getvalue()


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


def long_image(kind: str, width: int, height: int) -> bytes:
    file = BytesIO()
    Image.new("RGB", (width, height), (1, 2, 3)).save(file, kind)
    assert decodes(file.getvalue()) and max(width, height) > 64 * min(width, height)
    return file.getvalue()


def damaged(kind: str, rng: np.random.Generator, number: int) -> bytes:
    """Damage `number` of a kind of image."""
    whole_file = whole(kind, rng)[0]
    others = [
        b"",
        TEXT,
        zipped(),
        b"\0" * 500,
        b"\xff" * 500,
        whole_file[1:],
        b"\xef\xbb\xbf" + whole_file,
        claims(kind, 16000, 16000),
        claims(kind, 8193, 8192),
        long_image(kind, 1, 5000),
        long_image(kind, 5000, 1),
        long_image(kind, 3, 193),
    ]
    return others[number] if number < len(others) else truncated(whole_file, rng)


def test_exactly_the_damaged_files_are_bad(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    bad, good = set(), {}
    for at, (kind, suffix) in enumerate(KINDS.items()):
        folder = tmp_path / kind.lower()
        folder.mkdir()
        for number in range(58 if at == 0 else 57):
            name = f"{kind.lower()}/{number:03d}-bad.{suffix}"
            (tmp_path / name).write_bytes(damaged(kind, rng, number))
            bad.add(name)
        for number in range(0, 57, 5):
            name = f"{kind.lower()}/{number:03d}-good.{suffix.upper() if number % 2 else suffix}"
            data, good[name] = whole(kind, rng)
            (tmp_path / name).write_bytes(data)
    assert len(bad) == 400
    pictures = ImageFolder(tmp_path, SIZE)
    found = set()
    for index in range(len(pictures)):
        name = pictures.where(index)
        try:
            pixels, label = pictures[index]
        except DataError as error:
            message = str(error)
            assert message.startswith(f"cannot read image {tmp_path / name}: ") and len(message) < 400
            found.add(name)
        else:
            assert np.array_equal(pixels, good[name]) and pictures.names[label] == name.split("/")[0]
    assert found == bad and len(pictures) == len(bad) + len(good)
    report = scan_folder(tmp_path, Decoding())
    assert {name for name, _ in report.bad} == bad and all(reason for _, reason in report.bad)
    assert report.total == len(pictures) and sum(report.formats.values()) == len(good)


def test_what_is_no_file_is_bad(tmp_path: Path) -> None:
    """Folders, pipes (that would never answer), circles of links, links to nothing."""
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "circle.png").symlink_to("circle.png")
    (tmp_path / "nothing.png").symlink_to("gone.png")
    (tmp_path / "loop.png").symlink_to(".")
    for name, said in (
        ("folder", "not a file"),
        ("pipe", "not a file"),
        ("circle", "symbolic links"),
        ("nothing", "No such file"),
        ("loop", "not a file"),
    ):
        with pytest.raises(BadImage, match=said):
            open_image(tmp_path / f"{name}.png", Decoding())
    Image.new("L", (4, 4)).save(tmp_path / "ok.png")
    (tmp_path / "c").mkdir()
    for path in tmp_path.glob("*.png"):
        path.rename(tmp_path / "c" / path.name)
    pictures = ImageFolder(tmp_path, 4)
    assert [pictures.where(i) for i in range(len(pictures))] == [
        f"c/{n}.png" for n in ("circle", "nothing", "ok", "pipe")
    ]
    for index in (0, 1, 3):
        with pytest.raises(DataError, match="cannot read image"):
            pictures[index]


def test_files_without_permission(tmp_path: Path) -> None:
    """Not bad: a network's permissions run out and come back, and the file is whole."""
    path = tmp_path / "a.png"
    Image.new("L", (4, 4)).save(path)
    path.chmod(0)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        with pytest.raises(RunError, match=r"cannot read image .*a\.png: Permission denied"):
            open_image(path, Decoding())
    finally:
        if root:
            os.seteuid(0)


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
    """Row D4, files: each refused with a reason, in less than 1 GB and quickly."""
    files = bombs()
    assert len(files) >= 30
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    said = measured(tmp_path)
    assert {name for name, (reason, _, _) in said.items() if reason} == set(files), said
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
