"""EXIF orientations 1 to 8, with and without `exif`, against the definition (Exif 2.32, tag 0x0112)."""

import struct
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldit.data.images.decoding import Decoding, examine, open_image

BASE = np.random.default_rng(1).integers(0, 256, (4, 6, 3), dtype=np.uint8)
"""What is to be seen: no symmetry, no square."""


def as_stored(seen: np.ndarray, orientation: int) -> np.ndarray:
    """Where row 0 and column 0 of the stored image lie in the one that is seen."""
    turned = {
        1: seen,  # row 0 is the top, column 0 the left-hand side
        2: seen[:, ::-1],  # top, right
        3: seen[::-1, ::-1],  # bottom, right
        4: seen[::-1],  # bottom, left
        5: seen.transpose(1, 0, 2),  # left, top
        6: np.rot90(seen),  # right, top
        7: np.rot90(seen)[:, ::-1],  # right, bottom
        8: np.rot90(seen, -1),  # left, bottom
    }
    return np.ascontiguousarray(turned[orientation])


def block(orientation: int, order: str = "<", kind: int = 3, before: int = 0) -> bytes:
    """An EXIF block with the orientation after `before` other tags."""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "LH", 8, before + 1)
    others = b"".join(struct.pack(order + "HHLHH", 0x0100 + i, 3, 1, 7, 0) for i in range(before))
    return head + others + struct.pack(order + "HHLHHL", 0x0112, kind, 1, orientation, 0, 0)


def test_the_stored_images_are_the_definition() -> None:
    """Spelled out pixel by pixel, so that the table above rests on nothing else."""
    height, width = BASE.shape[:2]
    corner = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
    for orientation, place in corner.items():
        stored = as_stored(BASE, orientation)
        assert stored.shape[:2] == ((height, width) if orientation < 5 else (width, height))
        assert np.array_equal(stored[0, 0], BASE[place])
        row, column = (place[0], slice(None)) if orientation < 5 else (slice(None), place[1])
        assert {tuple(p) for p in stored[0].tolist()} == {tuple(p) for p in BASE[row, column].tolist()}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_deflate"}),
    ],
)
def test_orientations(orientation: int, kind: str, options: dict[str, Any]) -> None:
    file = BytesIO()
    stored = as_stored(BASE, orientation)
    if kind == "TIFF":
        Image.fromarray(stored).save(file, kind, tiffinfo={0x0112: orientation}, **options)
    else:
        Image.fromarray(stored).save(file, kind, exif=b"Exif\0\0" + block(orientation), **options)
    facts = examine(file, Decoding())
    assert facts.orientation == orientation and (facts.width, facts.height) == stored.shape[1::-1]
    assert np.array_equal(open_image(file, Decoding()), stored)
    assert np.array_equal(open_image(file, Decoding(exif=True)), BASE)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("order", "<>")
def test_jpeg_orientations(orientation: int, order: str) -> None:
    """Blocks of 16 x 16 of one grey each come through a JPEG within a level or two."""
    grey = np.arange(24).reshape(4, 6, 1) * 10
    large = np.repeat(np.repeat(np.repeat(grey, 16, 0), 16, 1), 3, 2).astype(np.uint8)
    file, exif = BytesIO(), b"Exif\0\0" + block(orientation, order, before=3)
    Image.fromarray(as_stored(large, orientation)).save(file, "JPEG", quality=100, exif=exif)
    assert examine(file, Decoding()).orientation == orientation
    for decoding, wanted in ((Decoding(), as_stored(large, orientation)), (Decoding(exif=True), large)):
        got = np.asarray(open_image(file, decoding)).astype(int)
        assert got.shape == wanted.shape and np.abs(got - wanted).max() <= 2


@pytest.mark.parametrize(
    "exif",
    [
        b"",
        b"II*\0",
        b"MM\0*\xff\xff\xff\xff",  # a directory outside of the block
        b"II*\0\x08\0\0\0\xff\xff",  # tags that are not there
        b"nothing of the kind",
        block(9),
        block(0),
        block(6, kind=2),  # letters
        block(6)[:-10],
    ],
)
def test_damaged_blocks_turn_nothing(exif: bytes) -> None:
    file = BytesIO()
    Image.fromarray(BASE).save(file, "PNG", exif=b"Exif\0\0" + exif)
    assert examine(file, Decoding()).orientation == 1
    assert np.array_equal(open_image(file, Decoding(exif=True)), BASE)


def test_orientation_in_a_text_of_a_png() -> None:
    """As ImageMagick wrote it before PNG had a chunk for it."""
    from PIL.PngImagePlugin import PngInfo

    text, file = PngInfo(), BytesIO()
    raw = b"Exif\0\0" + block(6, ">")
    text.add_text("Raw profile type exif", f"\nexif\n{len(raw):8}\n{raw.hex()[:72]}\n{raw.hex()[72:]}\n", zip=True)
    Image.fromarray(as_stored(BASE, 6)).save(file, "PNG", pnginfo=text)
    assert np.array_equal(open_image(file, Decoding(exif=True)), BASE)
