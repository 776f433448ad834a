"""Every mode's rule for RGB, from arithmetic on hand-made pixels."""

import struct
import subprocess
import sys
import warnings
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from ldit.data.images import decoding as module
from ldit.data.images.decoding import BadImage, Decoding, examine, open_image, read_square, to_rgb
from ldit.errors import RunError

WHITE = (255, 255, 255)
PAINT = (10, 200, 60)
RNG = np.random.default_rng(0)


def stored(image: Image.Image, kind: str, **options: Any) -> BytesIO:
    file = BytesIO()
    image.save(file, kind, **options)
    return file


def decoded(file: BytesIO, background: tuple[int, int, int] = WHITE) -> np.ndarray:
    return np.asarray(open_image(file, Decoding(background=background))).astype(int)


def over(colour: np.ndarray, alpha: np.ndarray, background: tuple[int, int, int]) -> np.ndarray:
    """Exact colours, times 255: c·a + b·(255 - a)."""
    return colour.astype(int) * alpha[..., None] + np.array(background) * (255 - alpha[..., None].astype(int))


def test_plain_modes() -> None:
    rgb = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    for kind, options in (("PNG", {}), ("BMP", {}), ("PPM", {}), ("TIFF", {}), ("WEBP", {"lossless": True})):
        assert np.array_equal(decoded(stored(Image.fromarray(rgb), kind, **options)), rgb), kind
    grey = RNG.integers(0, 256, (5, 7), dtype=np.uint8)
    for kind in ("PNG", "BMP", "PPM", "TIFF", "GIF"):
        assert np.array_equal(decoded(stored(Image.fromarray(grey), kind)), np.stack([grey] * 3, -1)), kind
    bits = RNG.integers(0, 2, (5, 7)).astype(bool)
    for kind in ("PNG", "BMP", "PPM", "TIFF"):
        assert np.array_equal(decoded(stored(Image.fromarray(bits), kind)), np.stack([bits * 255] * 3, -1)), kind
    assert np.asarray(to_rgb(Image.new("RGBX", (1, 1), (1, 2, 3, 4)))).tolist() == [[[1, 2, 3]]]


def test_palettes() -> None:
    palette = RNG.integers(0, 256, (256, 3), dtype=np.uint8)
    index = RNG.integers(0, 256, (6, 9), dtype=np.uint8)
    image = Image.fromarray(index, "L")
    image.putpalette(palette.tobytes())
    for kind in ("PNG", "GIF", "BMP", "TIFF"):
        file = stored(image, kind, **({"optimize": False} if kind == "GIF" else {}))
        assert np.array_equal(decoded(file), palette[index]), kind


@pytest.mark.parametrize("background", [WHITE, PAINT])
def test_alpha_is_composited(background: tuple[int, int, int]) -> None:
    """All pairs of colour and alpha; within the one level of Pillow's rounding, exact where alpha is 0 or 255."""
    level, alpha = (a.astype(np.uint8) for a in np.meshgrid(np.arange(256), np.arange(256)))
    colour = np.stack([level, 255 - level, level // 2], -1)
    rgba = Image.fromarray(np.dstack([colour, alpha]))
    for kind, options in (("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True, "exact": True})):
        got = decoded(stored(rgba, kind, **options), background)
        exact = over(colour, alpha, background)
        assert np.abs(got * 255 - exact).max() <= 255, kind
        assert np.array_equal(got[0], np.broadcast_to(background, (256, 3)))
        assert np.array_equal(got[255], colour[255])
    grey = decoded(stored(Image.fromarray(np.dstack([level, alpha]), "LA"), "PNG"), background)
    assert np.abs(grey * 255 - over(np.stack([level] * 3, -1), alpha, background)).max() <= 255
    # Premultiplied colours p = c·a/255 are stored rounded: half a level more, and as much when they are divided again.
    for mode, plain in (("RGBa", rgba), ("La", Image.fromarray(np.dstack([level, alpha]), "LA"))):
        got = np.asarray(to_rgb(plain.convert(mode), background)).astype(int)
        wanted = colour if mode == "RGBa" else np.stack([level] * 3, -1)
        assert np.abs(got * 255 - over(wanted, alpha, background)).max() <= 2 * 255, mode


def test_white_behind_is_as_it_always_was() -> None:
    """Stored models were trained on this: the whole image at once, by Pillow's compositing."""
    rgba = Image.fromarray(RNG.integers(0, 256, (40, 30, 4), dtype=np.uint8))
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    before = Image.alpha_composite(white, rgba).convert("RGB")
    assert np.array_equal(np.asarray(open_image(stored(rgba, "PNG"), Decoding())), np.asarray(before))


def test_transparent_colours_and_palettes() -> None:
    index = np.array([[0, 1, 2, 3]], np.uint8)
    image = Image.fromarray(index, "L")
    image.putpalette(bytes([9, 8, 7, 20, 30, 40, 50, 60, 70, 80, 90, 100]))
    some = decoded(stored(image, "PNG", transparency=bytes([255, 0, 51, 255])), PAINT)
    assert some[0, [0, 1, 3]].tolist() == [[9, 8, 7], list(PAINT), [80, 90, 100]]
    assert np.abs(some[0, 2] * 255 - (np.array([50, 60, 70]) * 51 + np.array(PAINT) * 204)).max() <= 255
    for kind in ("PNG", "GIF"):
        one = decoded(stored(image, kind, transparency=2), PAINT)
        assert one[0].tolist() == [[9, 8, 7], [20, 30, 40], list(PAINT), [80, 90, 100]], kind
    grey = Image.fromarray(np.array([[0, 100, 255]], np.uint8))
    assert decoded(stored(grey, "PNG", transparency=100), PAINT)[0].tolist() == [[0] * 3, list(PAINT), [255] * 3]
    rgb = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    assert decoded(stored(rgb, "PNG", transparency=(4, 5, 6)), PAINT)[0].tolist() == [[1, 2, 3], list(PAINT)]
    bits = Image.fromarray(np.array([[False, True]]))
    assert decoded(stored(bits, "PNG", transparency=1), PAINT)[0].tolist() == [[0] * 3, list(PAINT)]
    deep = Image.fromarray(np.array([[514, 770, 65535]], np.uint16))
    assert decoded(stored(deep, "PNG", transparency=770), PAINT)[0].tolist() == [[2] * 3, list(PAINT), [255] * 3]
    pa = image.convert("PA")
    pa.putalpha(Image.fromarray(np.array([[255, 0, 255, 0]], np.uint8)))
    assert np.asarray(to_rgb(pa, PAINT))[0].tolist() == [[9, 8, 7], list(PAINT), [50, 60, 70], list(PAINT)]
    quantised = Image.new("RGBA", (2, 1), (5, 6, 7, 0)).quantize(4)
    assert quantised.mode == "P" and np.asarray(to_rgb(quantised, PAINT))[0, 0].tolist() == list(PAINT)


def test_sixteen_bits_go_to_the_nearest_level() -> None:
    """All 65536 values: v/257 to the nearest, there are no ties."""
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    nearest = np.array([(2 * v + 257) // 514 for v in range(65536)]).reshape(256, 256)
    assert (np.abs(nearest * 257 - values.astype(int)) * 2 < 257).all()
    wanted = np.stack([nearest] * 3, -1)
    little = Image.fromarray(values)
    assert little.mode == "I;16"
    for kind, options in (("PNG", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_deflate"})):
        assert np.array_equal(decoded(stored(little, kind, **options)), wanted), (kind, options)
    big = Image.frombytes("I;16B", (256, 256), values.astype(">u2").tobytes())
    assert examine(stored(big, "TIFF"), Decoding()).mode == "I;16B"
    assert np.array_equal(decoded(stored(big, "TIFF")), wanted)
    for mode, kind in (("I;16L", "<u2"), ("I;16N", "=u2"), ("I;16B", ">u2")):
        image = Image.frombytes(mode, (256, 256), values.astype(kind).tobytes())
        assert np.array_equal(np.asarray(to_rgb(image)), wanted), mode
    graymap = BytesIO(b"P5 256 256 65535\n" + values.astype(">u2").tobytes())
    assert examine(graymap, Decoding()).mode == "I" and np.array_equal(decoded(graymap), wanted)


def test_wide_integers_and_floats_are_clipped() -> None:
    wide = np.array([[-5, 0, 257, 65535, 65536, 2**31 - 1, -(2**31)]], np.int32)
    file = stored(Image.fromarray(wide), "TIFF")
    assert examine(file, Decoding()).mode == "I" and decoded(file)[0, :, 0].tolist() == [0, 0, 1, 255, 255, 255, 0]
    floats = np.array([[-1, 0.4, 0.6, 254.7, 300, np.nan, np.inf, -np.inf, 1.5, 2.5]], np.float32)
    file = stored(Image.fromarray(floats), "TIFF")
    assert examine(file, Decoding()).mode == "F"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decoded(file)[0, :, 1].tolist() == [0, 0, 1, 255, 255, 0, 255, 0, 2, 2]


def test_cmyk() -> None:
    cmyk = RNG.integers(0, 256, (32, 32, 4), dtype=np.uint8)
    cmyk[0, :3] = (0, 0, 0, 0), (255, 0, 0, 0), (0, 0, 0, 255)
    left = 255 - cmyk.astype(int)
    got = decoded(stored(Image.fromarray(cmyk, "CMYK"), "TIFF"))
    assert np.abs(got * 255 - left[..., :3] * left[..., 3:]).max() <= 255
    assert got[0, :3].tolist() == [[255] * 3, [0, 255, 255], [0] * 3]
    # Adobe's JPEGs hold 255 - c: one flat ink, so that the transform changes nothing
    jpeg = stored(Image.new("CMYK", (16, 16), (200, 100, 50, 20)), "JPEG", quality=100)
    assert b"Adobe" in jpeg.getvalue() and examine(jpeg, Decoding()).mode == "CMYK"
    assert np.abs(decoded(jpeg) * 255 - np.array([55, 155, 205]) * 235).max() <= 3 * 255


def test_ycbcr_hsv_lab() -> None:
    ycc = RNG.integers(64, 192, (16, 16, 3), dtype=np.uint8)
    y, cb, cr = (ycc[..., i].astype(float) for i in range(3))
    jfif = np.stack([y + 1.402 * (cr - 128), y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128), y + 1.772 * (cb - 128)])
    got = np.asarray(to_rgb(Image.fromarray(ycc, "YCbCr"))).astype(int)
    assert np.abs(got - np.clip(jfif, 0, 255).transpose(1, 2, 0)).max() <= 1
    six = np.array([[[0, 255, 255], [85, 255, 255], [170, 255, 255], [43, 0, 99], [10, 255, 0]]], np.uint8)
    hsv = np.asarray(to_rgb(Image.fromarray(six, "HSV")))
    assert hsv.tolist() == [[[255, 0, 0], [0, 255, 0], [0, 0, 255], [99, 99, 99], [0, 0, 0]]]
    lab = np.array([[[0, 0, 0], [50, 0, 0], [100, 0, 0], [60, 20, -30], [70, -30, 40], [40, 40, 20]]])
    signed = np.stack([np.rint(lab[..., 0] * 2.55).astype(int), lab[..., 1] % 256, lab[..., 2] % 256], -1)
    got = decoded(stored(Image.frombytes("LAB", (6, 1), signed.astype(np.uint8).tobytes()), "TIFF"))
    assert np.abs(got - lab_to_srgb(lab.astype(float))).max() <= 3


def lab_to_srgb(lab: np.ndarray) -> np.ndarray:
    """CIE 15: L*a*b* with the white of D50 to XYZ; Bradford's matrix to D65 and IEC 61966-2-1 to sRGB, 0 … 255."""
    f = (lab[..., 0] + 16) / 116
    axes = np.stack([f + lab[..., 1] / 500, f, f - lab[..., 2] / 200], -1)
    xyz = np.where(axes > 6 / 29, axes**3, 3 * (6 / 29) ** 2 * (axes - 4 / 29)) * np.array([0.9642, 1.0, 0.8249])
    to_linear = np.array(  # D50 XYZ to linear sRGB
        [[3.1338561, -1.6168667, -0.4906146], [-0.9787684, 1.9161415, 0.0334540], [0.0719453, -0.2289914, 1.4052427]]
    )
    linear = np.clip(xyz @ to_linear.T, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def test_the_first_frame_counts() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        options = {"lossless": True} if kind == "WEBP" else {}
        first, *later = (frame.copy() for frame in frames)
        file = stored(first, kind, save_all=True, append_images=later, **options)
        assert examine(file, Decoding()).animated, kind
        assert (decoded(file) == (250, 0, 0)).all(), kind
        assert not examine(stored(frames[1].copy(), kind, **options), Decoding()).animated


def test_strips_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of more than a strip are converted in parts: the same pixels."""
    rgba = Image.fromarray(RNG.integers(0, 256, (23, 9, 4), dtype=np.uint8))
    palette = rgba.convert("RGB").quantize(16)
    palette.info["transparency"] = 3
    deep = Image.fromarray(RNG.integers(0, 65536, (23, 9), dtype=np.uint16))
    deep.info["transparency"] = int(np.asarray(deep)[11, 4])
    floats = Image.fromarray(RNG.uniform(0, 255, (23, 9)).astype(np.float32))
    pictures = [rgba, rgba.convert("RGBa"), rgba.convert("LA"), palette, deep, floats]
    whole = [np.asarray(to_rgb(image, PAINT)) for image in pictures]
    for pixels in (1, 9 * 5, 9 * 23 - 1):
        monkeypatch.setattr(module, "_STRIP", pixels)
        assert all(np.array_equal(to_rgb(p, PAINT), w) for p, w in zip(pictures, whole, strict=True))


def test_content_tells_the_format_not_the_name(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4), (9, 9, 9)).save(path, "BMP")
    assert examine(path, Decoding()).format == "BMP"
    assert read_square(path, 2, Decoding()).tolist() == [[[9] * 3] * 2] * 2
    for kind in ("ICO", "TGA", "PCX", "SGI", "JPEG2000", "DDS"):  # formats that Pillow knows and we do not take
        with pytest.raises(BadImage, match="not a JPEG"):
            open_image(stored(Image.new("RGB", (16, 16)), kind), Decoding())


def test_size_rules_to_the_pixel() -> None:
    file = stored(Image.new("L", (10, 11)), "PNG")
    assert open_image(file, Decoding(max_pixels=110)).size == (10, 11)
    with pytest.raises(BadImage, match=r"10 x 11 = 110 pixels, more than max_pixels 109"):
        open_image(file, Decoding(max_pixels=109))
    for size, good in (((64, 1), True), ((1, 64), True), ((65, 1), False), ((2, 129), False), ((128, 2), True)):
        file = stored(Image.new("L", size), "PNG")
        if good:
            assert open_image(file, Decoding()).size == size
        else:
            with pytest.raises(BadImage, match="more than 64 times"):
                open_image(file, Decoding())


def test_every_format_is_judged_by_its_header() -> None:
    image = Image.new("RGBA", (15, 20), (1, 2, 3, 0))
    other = Image.new("RGBA", (15, 20), (9, 9, 9, 255))
    files = [stored(image, kind) for kind in ("PNG", "WEBP", "TIFF")]
    files += [stored(image.convert("RGB"), kind) for kind in ("JPEG", "BMP", "PPM")]
    files += [stored(image, "GIF", save_all=True, append_images=[other], disposal=2)]
    files += [stored(image, "TIFF", compression="tiff_lzw")]
    for file in files:
        assert read_square(file, 16, Decoding()).shape == (16, 16, 3)
        with pytest.raises(BadImage, match="max_pixels 299"):
            open_image(file, Decoding(max_pixels=299))


def test_nothing_of_pillow_is_changed() -> None:
    """Not its checks, its readers, its limits: other users of Pillow in this process keep them. In a process of its
    own, as other tests may have changed them."""
    code = """
from PIL import Image
Image.init()
before = dict(vars(Image)), {kind: (reader, dict(vars(reader))) for kind, (reader, _) in Image.OPEN.items()}
import ldit.data.images.decoding, ldit.data.images.transforms, ldit.data.source
after = dict(vars(Image)), {kind: (reader, dict(vars(reader))) for kind, (reader, _) in Image.OPEN.items()}
assert before == after
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_lenient_pillow_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A global by which any library can make truncated images pass: no fault of an image."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(RunError, match="LOAD_TRUNCATED_IMAGES"):
        open_image(stored(Image.new("L", (4, 4)), "PNG"), Decoding())


def png(bits: int, kind: int, rows: list[bytes], *chunks: tuple[bytes, bytes]) -> BytesIO:
    """A PNG of these rows: four grey samples or one pixel of colour wide."""
    head = struct.pack(">LLBBBBB", 1 if kind == 2 else 4, len(rows), bits, kind, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [(b"IHDR", head), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    whole = (struct.pack(">L", len(d)) + n + d + struct.pack(">L", zlib.crc32(n + d)) for n, d in parts)
    return BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(whole))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_transparent_grey_of_few_bits(bits: int) -> None:
    """Each level in turn, and beside it what the number says beyond the bits of the file, which does not count."""
    top = (1 << bits) - 1
    for clear in {0, 1, top // 2, top - 1, top}:
        levels = [0, top, clear, (clear + 1) % (top + 1)]
        row = sum(level << bits * (3 - at) for at, level in enumerate(levels)) << (-4 * bits % 8)
        rows = [row.to_bytes(-(-4 * bits // 8), "big")] * 2
        for beyond in (0, 0x100, 1 << bits) if bits > 1 else (0,):
            file = png(bits, 0, rows, (b"tRNS", struct.pack(">H", clear | beyond)))
            wanted = [list(PAINT) if level == clear else [level * 255 // top] * 3 for level in levels]
            assert decoded(file, PAINT).tolist() == [wanted] * 2, clear


def test_a_transparent_colour_of_sixteen_bits() -> None:
    """The high bytes must agree, which are what is kept of the pixels."""
    clear = (0x1234, 0x5678, 0x9ABC)
    near = [(0x1334, 0x5678, 0x9ABC), (0x1234, 0x5678, 0x9BBC), (0x3412, 0x7856, 0xBC9A), (0, 0, 0)]
    rows = [struct.pack(">3H", *pixel) for pixel in (clear, *near, (0x1235, 0x56FF, 0x9A00))]
    got = decoded(png(16, 2, rows, (b"tRNS", struct.pack(">3H", *clear))), PAINT)[:, 0].tolist()
    assert got == [list(PAINT), *([v >> 8 for v in pixel] for pixel in near), list(PAINT)]
    assert decoded(png(16, 2, rows))[0, 0].tolist() == [0x12, 0x56, 0x9A]
    file = png(8, 2, [b"\1\2\3", b"\4\5\6"], (b"tRNS", struct.pack(">3H", 0x104, 5, 6)))
    assert decoded(file, PAINT)[:, 0].tolist() == [[1, 2, 3], list(PAINT)]


@pytest.mark.parametrize("line", ["{} {} {} ", "{:>6} {:>6} {:>6}\r\n"])
def test_plain_text_of_sixteen_bits(line: str) -> None:
    """The longest way to write pixels: 18 to 22 bytes each."""
    text = "P3 300 300 65535\n" + line.format(65535, 65535, 65535) * 90000
    assert (decoded(BytesIO(text.encode())) == 255).all()
