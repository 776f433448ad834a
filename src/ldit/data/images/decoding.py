"""Image files of every kind become RGB, 8 bits a channel, by one rule each; what is no sound image is a BadPicture.

Formats are told by content, never by name: JPEG, PNG, WebP, BMP, PPM (PBM, PGM, PPM, PFM), TIFF, GIF. Of an animation,
or a file with several pages, the first frame counts.

| mode in the file         | RGB                                                                                       |
|--------------------------|-------------------------------------------------------------------------------------------|
| RGB, RGBX                | as it is                                                                                  |
| 1, L, P                  | 0 or 255; grey repeated; the palette's colour                                             |
| LA La PA RGBA RGBa, or a | composited over `background`: a training image has no holes, and the colour under a     |
| colour named transparent | transparent pixel is whatever the editor left there                                       |
| CMYK                     | Pillow's (255-c)(255-k)/255; Adobe's inverted JPEGs are turned over first, as Pillow does |
| YCbCr, HSV, LAB          | Pillow's: JFIF, hexcone, CIE L*a*b* D50 to sRGB by LittleCMS                              |
| I;16 I;16L I;16B I;16N I | 16-bit grey: value/257 to the nearest, so that 0 -> 0 and 65535 -> 255; I, 32 bits wide,  |
|                          | holds 16-bit values in practice and is clipped to 0..65535                                |
| F                        | taken as 0..255: clipped, to the nearest (halves to even), NaN -> 0: no range is stated   |

Pillow itself clips 16-bit grey at 255, which makes nearly every such image white. Of 16-bit colour it keeps the high
byte. Colour profiles are not applied, as in ADM's ImageNet.

EXIF orientation (1-8; of EXIF blocks and TIFF tags, not of XMP) is applied with `Decoding.exif` only.

Size rules are judged by the header, before anything is decoded: more than `max_pixels` pixels, or a long side of more
than 64 short sides, is bad. Images are decoded whole: truncated ones never pass. Memory is two copies of 4 bytes a
pixel at most (WebP: four, most of them in its library; compressed TIFF: its file besides).

BadPicture is for what a file holds, or for none of that name. What the machine cannot do for now (no answer of the
network, no memory, no file descriptor left, no permission) is RunError, which no policy for bad images passes over.
"""

import errno
import os
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from ldit.data.images.limits import BadImage as BadImage
from ldit.data.images.limits import Metered, check_tiff, judge, no_file, pixels_at_most, unread
from ldit.data.images.transforms import center_crop
from ldit.errors import RunError

_STRIP = 1 << 20  # pixels converted at once where the conversion needs copies
_ORIENTATION = 0x0112
_SIXTEEN = ("I;16", "I;16L", "I;16B", "I;16N", "I")
# A PNG's grey of 2 and 4 bits: the bits that count, and what a level is multiplied with as it is unpacked.
_GREY_LEVELS = {"L;2": (3, 85), "L;4": (15, 17)}
_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Decoding:
    """How files become images."""

    exif: bool = False
    """Turn images as their EXIF orientation says."""
    background: tuple[int, int, int] = (255, 255, 255)
    """Colour behind transparent pixels."""
    max_pixels: int = 1 << 26
    """Larger images are bad."""


@dataclass(frozen=True)
class Facts:
    """What an image file holds."""

    format: str
    mode: str
    width: int
    height: int
    orientation: int
    """EXIF's, 1 where there is none."""
    animated: bool
    """More than one frame or page."""


class _Jpeg(JpegImagePlugin.JpegImageFile):
    def _read_dpi_from_exif(self) -> None:
        """Nothing: Pillow reads every tag for it, and a megabyte of EXIF can name itself in 65535 tags."""


class _Tiff(TiffImagePlugin.TiffImageFile):
    def load_end(self) -> None:
        """The image as stored: Pillow would turn it by its orientation here, whether asked to or not."""
        self._size = self.im.size


# The first bytes of a format's files, its reader, and KiB of header: comments, profiles, tags before the pixels.
# Pillow gathers a GIF's comment in pieces of 255 bytes and reads PPM's byte by byte: slow where they are long.
_READERS: tuple[tuple[Callable[[bytes], bool], type[ImageFile.ImageFile], int], ...] = (
    (lambda b: b[:3] == b"\xff\xd8\xff", _Jpeg, 32 << 10),
    (lambda b: b[:8] == b"\x89PNG\r\n\x1a\n", PngImagePlugin.PngImageFile, 64 << 10),
    (lambda b: b[:4] == b"RIFF" and b[8:12] == b"WEBP", WebPImagePlugin.WebPImageFile, 64 << 10),
    (lambda b: b[:2] == b"BM", BmpImagePlugin.BmpImageFile, 64 << 10),
    (lambda b: b[:1] == b"P" and b[1:2] in b"123456f" and b[2:3].isspace(), PpmImagePlugin.PpmImageFile, 64),
    (lambda b: b[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), _Tiff, 64 << 10),
    (lambda b: b[:6] in (b"GIF87a", b"GIF89a"), GifImagePlugin.GifImageFile, 512),
)


def read_square(source: Path | BinaryIO, size: int, decoding: Decoding) -> np.ndarray:
    """(size, size, 3) uint8, cut by ADM's centre crop; BadPicture says why not."""
    return np.asarray(center_crop(open_image(source, decoding), size))


def open_image(source: Path | BinaryIO, decoding: Decoding) -> Image.Image:
    """RGB, decoded whole, by the table above; BadPicture says why not. A file object is read from its start. RunError
    names an image that cannot be read for now; as from `read_square` and `examine`."""
    with _reading(source, decoding) as image:
        return _finish(image, decoding)


def examine(source: Path | BinaryIO, decoding: Decoding) -> Facts:
    """Decode as `open_image` does and say what the file holds; BadPicture says why not."""
    with _reading(source, decoding) as image:
        width, height = image.size
        mode, orientation = image.mode, _orientation(image)
        _finish(image, decoding)
        return Facts(str(image.format), mode, width, height, orientation, _animated(image))


@contextmanager
def opened(path: Path) -> Iterator[BufferedReader]:
    """The file for reading; BadPicture when there is none, or a folder, or a pipe (which would never answer); RunError
    when it will not open."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise BadImage("not a file")
        file = path.open("rb")
    except OSError as error:
        raise (BadImage(_reason(error)) if no_file(error) else unread(path, _reason(error))) from None
    except ValueError as error:  # a name that no file can have
        raise BadImage(_reason(error)) from None
    with file:
        yield file


@contextmanager
def _reading(source: Path | BinaryIO, decoding: Decoding) -> Iterator[ImageFile.ImageFile]:
    """The decoded image in the file's own mode. Damaged images raise nearly anything in Pillow: all of it, from
    here and from the block inside, is BadPicture, but for what is the machine's."""
    if isinstance(source, os.PathLike):
        with opened(source) as file, _reading(file, decoding) as image:
            yield image
        return
    try:
        with pixels_at_most(decoding.max_pixels):
            yield _load(source, decoding)
    except (BadImage, RunError):
        raise
    except Exception as error:
        raise (unread(source, _reason(error)) if _of_machine(error) else BadImage(_reason(error))) from None


def _load(file: IO[bytes], decoding: Decoding) -> ImageFile.ImageFile:
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise unread(file, "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set: truncated images would pass unseen")
    file.seek(0)
    meter = Metered(file, 64 << 20)
    start = meter.read(16)
    if not start:
        raise BadImage("the file is empty")
    found = next((row for row in _READERS if row[0](start)), None)
    if found is None:
        raise BadImage("not a JPEG, PNG, WebP, BMP, PPM, TIFF or GIF image")
    reader, header = found[1], found[2] << 10
    if reader is _Tiff:
        check_tiff(cast(IO[bytes], meter), decoding.max_pixels)
    elif reader is WebPImagePlugin.WebPImageFile:
        header += 8 * decoding.max_pixels  # its reader takes the whole file
    image, meter = _undecoded(file, reader, header)
    judge(*image.size, decoding.max_pixels)
    meter.left += 24 * image.width * image.height  # plain-text PPM is the longest: three numbers of 16 bits a pixel
    if reader is _Tiff:  # libtiff takes the whole file
        meter.left += min(file.seek(0, os.SEEK_END), 8 * decoding.max_pixels)
    layout = image.tile[0][3] if isinstance(image, PngImagePlugin.PngImageFile) and image.tile else ""
    image.load()
    if layout:
        _clear_colour(image, str(layout), file)
    return image


def _undecoded(file: IO[bytes], reader: type[ImageFile.ImageFile], header: int) -> tuple[ImageFile.ImageFile, Metered]:
    """The image, of which only the header is read."""
    file.seek(0)
    meter = Metered(file, header)
    # Nameless: a name makes Pillow map files that may shrink meanwhile
    return reader(cast(IO[bytes], meter), ""), meter


def _clear_colour(image: ImageFile.ImageFile, layout: str, file: IO[bytes]) -> None:
    """Mend what a PNG says of its transparent colour (PNG 1.2, 4.2.1.1): Pillow leaves the number as the file has it,
    and compares it with pixels that it has brought to 8 bits."""
    stated = image.info.get("transparency")
    if isinstance(stated, int) and layout in _GREY_LEVELS:
        bits, factor = _GREY_LEVELS[layout]
        image.info["transparency"] = (stated & bits) * factor
    elif isinstance(stated, tuple) and layout == "RGB;16B":
        # All 16 bits must agree. Pillow keeps the high byte; read the other way round, the low one.
        low, meter = _undecoded(file, PngImagePlugin.PngImageFile, 64 << 20)
        meter.left += 24 * low.width * low.height
        low.tile = [tile._replace(args="RGB;16L") for tile in low.tile]
        low.load()
        alpha = Image.new("L", image.size, 255)
        for box in _strips(image.size):
            pairs = zip((image, low), ([v >> 8 for v in stated], [v & 255 for v in stated]), strict=True)
            same = [(np.asarray(half.crop(box)) == values).all(2) for half, values in pairs]
            alpha.paste(0, box, Image.fromarray(same[0] & same[1]))
        del image.info["transparency"]
        image.putalpha(alpha)


def _of_machine(error: Exception) -> bool:
    """Whether the machine failed, not the image. Pillow's own OSErrors have no number, and that of a decoder without
    memory its words; an offset that no file can have is refused as EINVAL."""
    if isinstance(error, OSError):
        numbered = error.errno is not None and error.errno != errno.EINVAL
        return numbered or str(error).startswith("out of memory")
    return isinstance(error, MemoryError)


def _finish(image: ImageFile.ImageFile, decoding: Decoding) -> Image.Image:
    rgb = to_rgb(image, decoding.background)
    turn = _TURNS.get(_orientation(image)) if decoding.exif else None
    return rgb if turn is None else rgb.transpose(turn)


def to_rgb(image: Image.Image, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """A decoded image of any mode as RGB, by the table above."""
    if image.mode in _SIXTEEN or image.mode == "F":
        return _by_strips(image, lambda strip: _grey(strip, background))
    palette_alpha = image.palette is not None and image.palette.mode.endswith("A")
    if image.mode in _ALPHA or "transparency" in image.info or palette_alpha:
        return _by_strips(image, lambda strip: _composite(strip, background))
    return image.convert("RGB")


def _by_strips(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """`convert`, which looks at single pixels alone, over strips of rows, so that its copies stay small."""
    boxes = list(_strips(image.size))
    if len(boxes) == 1:
        return convert(image)
    rgb = Image.new("RGB", image.size)
    for box in boxes:
        rgb.paste(convert(image.crop(box)), box)
    return rgb


def _strips(size: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    """(left, top, right, bottom) of rows that hold _STRIP pixels together, or of single ones."""
    width, height = size
    rows = max(1, _STRIP // width)
    for top in range(0, height, rows):
        yield 0, top, width, min(top + rows, height)


def _composite(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode == "La":
        image = image.convert("LA")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, (*background, 255)), rgba).convert("RGB")


def _grey(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Grey of 16 bits or floats; the value that a PNG names as transparent becomes the background."""
    values = np.asarray(image)
    if image.mode == "F":
        grey = np.rint(np.clip(np.nan_to_num(values, nan=0.0), 0, 255)).astype(np.uint8)
    else:
        grey = ((np.clip(values.astype(np.int32), 0, 65535) + 128) // 257).astype(np.uint8)
    rgb = np.repeat(grey[:, :, None], 3, axis=2)
    if isinstance(clear := image.info.get("transparency"), int):
        rgb[values == clear] = background
    return Image.fromarray(rgb)


def _animated(image: ImageFile.ImageFile) -> bool:
    """Asked last: a GIF drops its image to look for the next frame. What follows the first may be damaged."""
    try:
        return bool(getattr(image, "is_animated", False))
    except RunError:
        raise
    except Exception:
        return False


def _orientation(image: ImageFile.ImageFile) -> int:
    """1 to 8; 1 where none is stated or the EXIF block is damaged, which says nothing about the pixels."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        stated: Any = image.tag_v2.get(_ORIENTATION)
    else:
        stated = _exif_orientation(_exif_block(image.info))
    return stated if isinstance(stated, int) and 1 <= stated <= 8 else 1


def _exif_block(info: dict[Any, Any]) -> bytes:
    block = info.get("exif")
    if block is None and isinstance(text := info.get("Raw profile type exif"), str):  # ImageMagick's PNGs
        try:
            block = bytes.fromhex("".join(text.split("\n")[3:]))
        except ValueError:
            return b""
    return block.removeprefix(b"Exif\0\0") if isinstance(block, bytes) else b""


def _exif_orientation(block: bytes) -> int | None:
    """Tag 0x0112 of the first directory (Exif 2.32, 4.6.2). Read here: Pillow copies out all that every tag names."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(block[:4])
    if order is None:
        return None
    try:
        (at,) = struct.unpack_from(order + "L", block, 4)
        (count,) = struct.unpack_from(order + "H", block, at)
        for entry in range(count):
            tag, kind, values, short, _ = struct.unpack_from(order + "HHLHH", block, at + 2 + 12 * entry)
            if tag == _ORIENTATION:
                return int(short) if kind == 3 and values == 1 else None
    except struct.error:
        pass
    return None


def _reason(error: Exception) -> str:
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(said.split())[:200] or type(error).__name__
