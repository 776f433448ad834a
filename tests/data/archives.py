"""Tar archives by the standard library, and what a set of them holds."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from data.hostile_tars import png

from ldit.data.formats.tars import TarImages
from ldit.data.images.decoding import Decoding

PLAIN = Decoding()


def pack(path: Path, files: Iterable[tuple[str, bytes]], kind: int = tarfile.USTAR_FORMAT) -> Path:
    """An archive by the standard library."""
    with tarfile.open(path, "w", format=kind) as archive:
        for name, data in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def samples(count: int, classes: int = 2, prefix: str = "", base: int = 0) -> list[tuple[str, bytes]]:
    """`count` images, the i-th of grey base + i, and their labels i mod `classes`."""
    pairs = [
        ((f"{prefix}{i:04}.png", png(base + i)), (f"{prefix}{i:04}.cls", b"%d\n" % (i % classes))) for i in range(count)
    ]
    return [file for pair in pairs for file in pair]


def open_tars(root: Path, **settings: Any) -> TarImages:
    return TarImages(root, 4, PLAIN, **settings)


def wheres(data: TarImages) -> list[str]:
    return [data.where(i) for i in range(len(data))]


def greys(data: TarImages) -> list[int]:
    """Each image's grey, which all of its pixels have."""
    found = []
    for i in range(len(data)):
        image, _ = data[i]
        assert image.shape == (4, 4, 3) and image.dtype == np.uint8 and (image == image[0, 0, 0]).all()
        found.append(int(image[0, 0, 0]))
    return found


def labels(data: TarImages) -> list[int]:
    return [data[i][1] for i in range(len(data))]
