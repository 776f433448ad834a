"""Decoding: an image file of any mode to RGB, 8 bits a channel; BadImage says why a file is none.

Formats are recognised by content, not by name: JPEG, PNG, WebP, BMP, PPM (PBM, PGM, PPM, PFM), TIFF, GIF. Of an
animation, or a file with several pages, the first frame is used.

| mode in the file         | RGB                                                                                       |
|--------------------------|-------------------------------------------------------------------------------------------|
| RGB, RGBX                | as it is                                                                                  |
| 1, L, P                  | 0 or 255; grey repeated; the palette's colour                                             |
| LA La PA RGBA RGBa, or a | composited over `background`: the colour under a transparent pixel is whatever the editor |
| colour named transparent | left there                                                                                |
| CMYK                     | Pillow's (255-c)(255-k)/255; Adobe's inverted JPEGs are inverted first, as Pillow does    |
| YCbCr, HSV, LAB          | Pillow's: JFIF, hexcone, CIE L*a*b* D50 to sRGB by LittleCMS                              |
| I;16 I;16L I;16B I;16N I | 16-bit grey: value/257 to the nearest, so that 0 -> 0 and 65535 -> 255; I, 32 bits wide,  |
|                          | holds 16-bit values in practice and is clipped to 0..65535                                |
| F                        | taken as 0..255: clipped, to the nearest (halves to even), NaN -> 0: no range is stated   |

Pillow itself clips 16-bit grey at 255, which makes nearly every such image white. Of 16-bit colour the high byte is
used, also of the colour that such a PNG names as transparent. Colour profiles are not applied, as in ADM's ImageNet;
of a PNG's ancillary chunks only transparency and EXIF orientation are read, and faults of the others are no faults of
its pixels.

The EXIF orientation (1-8; from the EXIF block or the TIFF tag, else from XMP, as Pillow reads it) is applied only with
`Decoding.exif`.

Sizes are checked in the header, before anything is decoded: an image of more than `max_pixels` pixels, or whose long
side is more than 64 times the short one, is bad. So is a file of more than 256 MiB, or with a header of more than 8
MiB. Images are decoded completely, so truncated ones are always noticed. Memory: the file and two copies of 4 bytes a
pixel (WebP: four, most of them in its library). Pillow's own limit for GIF and TIFF (`Image.MAX_IMAGE_PIXELS`) applies
too. Not refused: a JPEG whose EXIF block spans several segments and has thousands of tags that each name all of it;
Pillow copies every tag.

BadImage means that the content of the file is at fault, or that there is no such file. When the machine cannot read it
for now (network does not answer, no memory, no file descriptors left, no permission), RunError is raised, whatever the
policy for bad images.
"""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

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

from ldit.data.images.limits import MOST_BYTES, MOST_EXIF, HeaderLimit, check_size, no_file, unread
from ldit.data.images.limits import BadImage as BadImage
from ldit.data.images.png import SIGNATURE, pixels_only
from ldit.data.images.transforms import center_crop
from ldit.data.images.warned import warnings_named
from ldit.errors import RunError
from ldit.storage.strange import strange

_BEGINNING = 1 << 16  # bytes that hold most headers
_STRIP = 1 << 20  # pixels converted at once where the conversion needs copies
_ORIENTATION = 0x0112
_SIXTEEN = ("I;16", "I;16L", "I;16B", "I;16N", "I")
_GREY_LEVELS = {"L;2": 85, "L;4": 17}  # what a level of a PNG's grey of 2 and 4 bits is multiplied with
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
_ANIMATED = "ldit animated"  # key of an image's info: a PNG whose animation was taken out
_BACK = {6: 8, 8: 6}  # the orientation whose turn undoes another's; all others undo themselves
# The first bytes of each format's files, and Pillow's class that reads it.
_READERS: tuple[tuple[tuple[bytes, ...], type[ImageFile.ImageFile]], ...] = (
    ((b"\xff\xd8\xff",), JpegImagePlugin.JpegImageFile),
    ((SIGNATURE,), PngImagePlugin.PngImageFile),
    ((b"RIFF",), WebPImagePlugin.WebPImageFile),
    ((b"BM",), BmpImagePlugin.BmpImageFile),
    (tuple(b"P%c" % kind for kind in b"123456f"), PpmImagePlugin.PpmImageFile),
    ((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), TiffImagePlugin.TiffImageFile),
    ((b"GIF87a", b"GIF89a"), GifImagePlugin.GifImageFile),
)


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
    """Format, mode and size of an image file."""

    format: str
    mode: str
    width: int
    height: int
    """As stored, before any turn."""
    orientation: int
    """The EXIF orientation; 1 where there is none."""
    animated: bool
    """More than one frame or page."""


def read_square(source: Path | BinaryIO, size: int, decoding: Decoding) -> np.ndarray:
    """(size, size, 3) uint8, cut by ADM's centre crop; raises as `open_image`."""
    return np.asarray(center_crop(open_image(source, decoding), size))


def open_image(source: Path | BinaryIO, decoding: Decoding) -> Image.Image:
    """The image as RGB, by the table above. A file object is read from its start. BadImage says why it cannot be
    decoded; RunError names an image that the machine cannot read for now."""
    with _decoded(source, decoding) as (image, turned):
        return _finish(image, turned, decoding)


def examine(source: Path | BinaryIO, decoding: Decoding) -> Facts:
    """Decode the file as `open_image` does, and return format, mode and size; raises the same errors."""
    with _decoded(source, decoding) as (image, turned):
        width, height = image.size if turned < 5 else image.size[::-1]
        mode, orientation = image.mode, turned if _turns_itself(image) else _orientation(image)
        _finish(image, turned, decoding)
        return Facts(str(image.format), mode, width, height, orientation, _animated(image))


def orientation_of(source: Path | BinaryIO) -> int:
    """The EXIF orientation of an image file, from its header; 1 also for a file that cannot be read."""
    try:
        data = _read(source)
        reader = next((reader for starts, reader in _READERS if data.startswith(starts)), None)
        return 1 if reader is None else _orientation(reader(HeaderLimit(data), ""))
    except Exception:
        return 1


def dimensions(source: Path | BinaryIO, decoding: Decoding) -> tuple[int, int] | None:
    """(width, height) of the image that `open_image` gives, from its header; None where that cannot be read."""
    # The beginning of a file is enough, unless its header is long or, as WebP's reader, it wants the whole.
    parts: tuple[int | None, ...] = (_BEGINNING, None) if isinstance(source, os.PathLike) else (None,)
    for most in parts:
        try:
            data = _read(source, most)
            reader = next((reader for starts, reader in _READERS if data.startswith(starts)), None)
            if reader is None:
                return None
            image = reader(HeaderLimit(data), "")
            check_size(*image.size, decoding.max_pixels)
            turned = decoding.exif and _orientation(image) > 4
        except RunError:  # the machine's fault: another start would find another size
            raise
        except Exception:
            continue
        return image.size[::-1] if turned else image.size
    return None


@contextmanager
def opened(path: Path) -> Iterator[BufferedReader]:
    """The file for reading. BadImage when there is no file, or it is a folder or a pipe (reading it would never end);
    RunError when it does not open."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise BadImage("not a file")
        file = path.open("rb")
    except OSError as error:
        raise (BadImage(_reason(error)) if no_file(error) else unread(path, _reason(error))) from None
    except ValueError as error:  # an impossible file name
        raise BadImage(_reason(error)) from None
    with file:
        yield file


@contextmanager
def _decoded(source: Path | BinaryIO, decoding: Decoding) -> Iterator[tuple[ImageFile.ImageFile, int]]:
    """The decoded image in the file's own mode, and the orientation by which Pillow turned it.

    Damaged images raise nearly any exception in Pillow. All of them become BadImage, also those raised in the `with`
    block, except a lack of memory."""
    data = _read(source)
    try:
        with warnings_named(getattr(source, "name", "") if not isinstance(source, os.PathLike) else str(source)):
            yield _decode(data, decoding)
    except BadImage:
        raise
    except Exception as error:
        # Pillow's decoders report a lack of memory as an OSError of these words
        if isinstance(error, MemoryError) or str(error).startswith("out of memory"):
            raise unread(source, _reason(error)) from None
        raise BadImage(_reason(error)) from None


def _read(source: Path | BinaryIO, most: int | None = None) -> bytes:
    """The bytes of the file, at most the first `most`. Errors here are the machine's fault, later ones the image's."""
    if isinstance(source, os.PathLike):
        with opened(source) as file:
            return _read(file, most)
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise unread(source, "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set: truncated images would pass unseen")
    try:
        size = source.seek(0, os.SEEK_END)
        if size > MOST_BYTES:
            raise BadImage(f"the file is larger than {MOST_BYTES >> 20} MiB")
        source.seek(0)
        data = source.read() if most is None else source.read(most)
    except (OSError, MemoryError) as error:
        raise unread(source, _reason(error)) from None
    if not data:
        raise BadImage("the file is empty")
    return data


def _decode(data: bytes, decoding: Decoding) -> tuple[ImageFile.ImageFile, int]:
    """(image, orientation by which Pillow turned it, 1 = not at all) of a file's bytes."""
    reader = next((reader for starts, reader in _READERS if data.startswith(starts)), None)
    if reader is None:
        raise BadImage(strange(data) or "not a JPEG, PNG, WebP, BMP, PPM, TIFF or GIF image")
    # Pillow refuses a PNG for faults in chunks that its pixels do not depend on: it is given those that they do.
    data, animated = pixels_only(data) if reader is PngImagePlugin.PngImageFile else (data, False)
    # The header alone is read here. Nameless: by a name Pillow would map the file into memory.
    file = HeaderLimit(data)
    image = reader(file, "")
    check_size(*image.size, decoding.max_pixels)
    # Read the orientation before loading: Pillow removes the tag when it turns the image.
    turned = _orientation(image) if _turns_itself(image) else 1
    layout = image.tile[0].args if isinstance(image, PngImagePlugin.PngImageFile) and image.tile else ""
    # Decode the pixels.
    file.lift()
    image.load()
    _scale_transparency(image, layout)
    image.info[_ANIMATED] = animated
    return image, turned


def _scale_transparency(image: Image.Image, layout: object) -> None:
    """Scale the colour that a PNG names as transparent to 8 bits. Pillow scales the pixels but not this colour."""
    transparent = image.info.get("transparency")
    if isinstance(transparent, int) and layout in _GREY_LEVELS:
        factor = _GREY_LEVELS[str(layout)]
        image.info["transparency"] = (transparent & 255 // factor) * factor
    elif isinstance(transparent, tuple) and layout == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in transparent)


def _finish(image: ImageFile.ImageFile, turned: int, decoding: Decoding) -> Image.Image:
    """The image as RGB: turned by its EXIF orientation with `Decoding.exif`, else as it is stored in the file."""
    rgb = to_rgb(image, decoding.background)
    orientation = _BACK.get(turned, turned)
    if decoding.exif:
        orientation = 1 if _turns_itself(image) else _orientation(image)
    return rgb if orientation == 1 else rgb.transpose(_TURNS[orientation])


def to_rgb(image: Image.Image, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """A decoded image of any mode as RGB, by the table above."""
    if image.mode in _SIXTEEN or image.mode == "F":
        return _by_strips(image, lambda strip: _grey(strip, background))
    palette_alpha = image.palette is not None and image.palette.mode.endswith("A")
    if image.mode in _ALPHA or "transparency" in image.info or palette_alpha:
        return _by_strips(image, lambda strip: _composite(strip, background))
    return image.convert("RGB")


def _by_strips(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """`convert` on strips of rows, so that its copies stay small. It must treat each pixel by itself."""
    width, height = image.size
    rows = max(1, _STRIP // width)
    if rows >= height:
        return convert(image)
    rgb = Image.new("RGB", image.size)
    for top in range(0, height, rows):
        box = (0, top, width, min(top + rows, height))
        rgb.paste(convert(image.crop(box)), box)
    return rgb


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
    if isinstance(transparent := image.info.get("transparency"), int):
        rgb[values == transparent] = background
    return Image.fromarray(rgb)


def _turns_itself(image: Image.Image) -> bool:
    """Whether Pillow always turns the image by its orientation when it loads it, as it does with TIFF."""
    return isinstance(image, TiffImagePlugin.TiffImageFile)


def _orientation(image: Image.Image) -> int:
    """1 to 8; 1 where there is none. A damaged EXIF block counts as none: the pixels may be intact."""
    if len(image.info.get("exif", b"")) > MOST_EXIF:
        return 1
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except (BadImage, MemoryError):
        raise
    except Exception:
        return 1
    return next((turn for turn in range(1, 9) if turn == orientation), 1)


def _animated(image: ImageFile.ImageFile) -> bool:
    """Whether there is a second frame. Called last, because a GIF drops its image to look for it. What follows the
    first frame may be damaged."""
    try:
        return bool(image.info.get(_ANIMATED) or getattr(image, "is_animated", False))
    except Exception:
        return False


def _reason(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:200] or type(error).__name__
