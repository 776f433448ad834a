"""PNGs whose pixels are sound and whose other chunks are not: the pixels decide."""

import subprocess
import sys
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from data.image_files import chunk, plain_tiff
from PIL import Image

from ldit.data.images import png
from ldit.data.images.decoding import BadImage, Decoding, examine, open_image

PIXELS = np.random.RandomState(0).randint(0, 256, (9, 7, 3)).astype(np.uint8)


def plain(**options: object) -> bytes:
    file = BytesIO()
    Image.fromarray(PIXELS).save(file, "png", **options)
    return file.getvalue()


def with_chunk(extra: bytes, data: bytes | None = None, before: bytes = b"IDAT") -> bytes:
    """The file with bytes put in front of its first chunk of this type."""
    data = plain() if data is None else data
    at = data.index(before) - 4
    return data[:at] + extra + data[at:]


def damaged(name: bytes, body: bytes) -> bytes:
    """A chunk whose checksum is wrong."""
    return chunk(name, body)[:-1] + bytes([chunk(name, body)[-1] ^ 1])


LONG = zlib.compress(b"\0" * (3 << 20))
ODD = {
    "long profile": chunk(b"iCCP", b"x\0\0" + LONG),
    "long packed text": chunk(b"zTXt", b"x\0\0" + LONG),
    "long text": chunk(b"tEXt", b"x\0" + b"t" * (2 << 20)),
    "long international text": chunk(b"iTXt", b"x\0\1\0\0\0" + LONG),
    "long XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LONG),
    "long raw EXIF": chunk(b"zTXt", b"Raw profile type exif\0\0" + LONG),
    "many long texts": chunk(b"zTXt", b"x\0\0" + zlib.compress(b"\0" * (1 << 20))) * 80,
    "short sRGB": chunk(b"sRGB", b""),
    "short pHYs": chunk(b"pHYs", b"\0"),
    "short gAMA": chunk(b"gAMA", b"\0\1"),
    "short cHRM": chunk(b"cHRM", b"\0"),
    "short tIME": chunk(b"tIME", b"\0"),
    "empty profile": chunk(b"iCCP", b""),
    "profile that does not unpack": chunk(b"iCCP", b"x\0\0nonsense"),
    "text that does not unpack": chunk(b"zTXt", b"Raw profile type exif\0\0nonsense"),
    "text packed in an unknown way": chunk(b"zTXt", b"x\0\7abc"),
    "text without an end": chunk(b"tEXt", b"x" * 100),
    "text of no code": chunk(b"iTXt", b"x\0\0\0\0\0\xff\xfe"),
    "damaged EXIF": chunk(b"eXIf", b"nonsense"),
    "short animation control": chunk(b"acTL", b"\0"),
    "frame out of order": chunk(b"fcTL", b"\0" * 26),
    "private": chunk(b"vpAg", b"anything"),
    **{f"wrong checksum of {name.decode()}": damaged(name, b"\0" * 9) for name in
       (b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"gAMA", b"sRGB", b"pHYs", b"tIME", b"eXIf", b"sBIT", b"bKGD", b"acTL")},
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("place", [b"IDAT", b"IEND"])
def test_odd_chunks_are_no_fault_of_the_pixels(name: str, place: bytes, recwarn: pytest.WarningsRecorder) -> None:
    for exif in (False, True):
        image = open_image(BytesIO(with_chunk(ODD[name], before=place)), Decoding(exif=exif))
        assert np.array_equal(np.asarray(image), PIXELS)
    assert not recwarn.list


def test_what_pixels_need_is_kept() -> None:
    """Palette, transparency, 16 bits, interlacing, and the orientation wherever it is written."""
    for mode, options in (("P", {}), ("P", {"transparency": 3}), ("L", {"transparency": 9}), ("I;16", {}), ("1", {})):
        file = BytesIO()
        source = Image.fromarray(PIXELS[..., 0]).convert("L")
        (source.convert(mode) if mode != "I;16" else source.convert("I").convert("I;16")).save(file, "png", **options)
        odd = with_chunk(ODD["short gAMA"] + ODD["long profile"], file.getvalue(), b"PLTE" if mode == "P" else b"IDAT")
        assert open_image(BytesIO(odd), Decoding()).tobytes() == open_image(file, Decoding()).tobytes(), mode
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = with_chunk(ODD["long profile"], plain(exif=exif))
    assert open_image(BytesIO(turned), Decoding(exif=True)).size == (9, 7)
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="6"/></x:xmpmeta>'
    for body in (b"\0\0\0\0" + xmp, b"\1\0\0\0" + zlib.compress(xmp)):
        turned = with_chunk(chunk(b"iTXt", b"XML:com.adobe.xmp\0" + body))
        assert open_image(BytesIO(turned), Decoding(exif=True)).size == (9, 7)


def test_faults_of_the_pixels_stay_faults() -> None:
    sound = plain()
    at = sound.index(b"IDAT") + 4
    for broken in (
        sound[: at + 20],
        sound[:at] + bytes([sound[at] ^ 255]) + sound[at + 1 :],
        with_chunk(damaged(b"tRNS", b"\0" * 6)),
        with_chunk(damaged(b"PLTE", b"\0" * 6)),
        with_chunk(b"\0\0\0\0\1\2\3\4"),
        with_chunk(b"\xff\xff\xff\xfftEXt"),
    ):
        with pytest.raises(BadImage):
            open_image(BytesIO(broken), Decoding())


def test_a_file_of_too_many_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(png, "_MOST_CHUNKS", 10)
    open_image(BytesIO(with_chunk(ODD["private"] * 7)), Decoding())
    with pytest.raises(BadImage, match="its chunks are too many: more than 10"):
        open_image(BytesIO(with_chunk(ODD["private"] * 8)), Decoding())


def test_animations_are_counted() -> None:
    file = BytesIO()
    frames = [Image.new("RGB", (8, 8), (grey, 0, 0)) for grey in (1, 200, 90)]
    frames[0].save(file, "png", save_all=True, append_images=frames[1:])
    assert examine(file, Decoding()).animated and open_image(file, Decoding()).getpixel((0, 0)) == (1, 0, 0)
    assert not examine(BytesIO(plain()), Decoding()).animated


def test_warnings_name_the_file(tmp_path: Path) -> None:
    """A TIFF with a tag that breaks off, among sound images, read by two threads."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "odd.tif").write_bytes(plain_tiff(8, 8, (305, 2, 400, 1 << 20), rest=b"\7" * 64))
    for i in range(4):
        (tmp_path / "a" / f"{i}.png").write_bytes(plain())
    command = [sys.executable, "-m", "ldit", "data", "check", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if "Corrupt" in line or "Truncated" in line]
    assert lines and all(str(tmp_path / "a" / "odd.tif") in line for line in lines), done.stderr
    assert "TiffImagePlugin" not in done.stderr
