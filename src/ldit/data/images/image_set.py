"""ImageSet: square RGB images of one size with a class each, in memory or in files."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ldit.data.captions import Captions
from ldit.data.images.decoding import Decoding
from ldit.errors import DataError


class ImageSet(ABC):
    """Square RGB images of one size with a class each (see `ldit.data.samples.Samples`). Reading must be safe from
    several threads at once."""

    root: Path
    """The folder, for messages."""
    size: int
    """Side of the images in pixels."""
    names: tuple[str, ...] = ()
    """Class names by index; empty for a set without classes, whose every label is 0."""
    num_before_cap: int
    """Number of images before `max_per_class`."""
    cache: None = None
    decoding: Decoding = Decoding()
    """How its files become images."""

    def captions(self) -> Captions:
        """The captions of the images, by `caption_row`. DataError for a set without captions, and names an image
        without one."""
        raise DataError(f"{self.root}: its images have no captions, which text models are trained on (docs/data.md)")

    def caption_row(self, index: int) -> int:
        """The place of image `index` in `captions`, which training and held-out images may share."""
        return index

    @property
    def shape(self) -> tuple[int, int, int]:
        """(3, S, S)."""
        return (3, self.size, self.size)

    def keep_index(self, folder: Path) -> None:
        """Save in `folder` the index that the next start would have to make again. Sets without an index do nothing."""
        return

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """(size, size, 3) uint8 RGB and its class; DataError names what cannot be read."""

    @abstractmethod
    def where(self, index: int) -> str:
        """The name of image `index`: its path below `root`, or its number in its file."""

    def label(self, index: int) -> int:
        """The class of image `index`."""
        return self[index][1]

    def source(self, index: int) -> Path | BinaryIO | None:
        """The file of image `index`; None for a set that is not made of image files."""
        return None

    def aliases(self, index: int) -> tuple[str, ...]:
        """What a held-out list may call image `index`."""
        return (self.where(index),)

    @abstractmethod
    def fingerprint(self) -> str:
        """Hex sha256 of the set and its order: equal for equal sets only."""

    def read(self, index: int, flip: bool, out: np.ndarray) -> int:
        """Fill `out` (3, S, S) fp32 with value/127.5 - 1, mirrored left to right with `flip`; returns the class."""
        image, label = self[index]
        normalise(image[:, ::-1] if flip else image, out)
        return label


def normalise(image: np.ndarray, out: np.ndarray) -> None:
    """Write uint8 (H, W, 3) as value/127.5 - 1 into `out`, float32 (3, H, W)."""
    np.divide(image.transpose(2, 0, 1), np.float32(127.5), out=out)
    out -= 1
