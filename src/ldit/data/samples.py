"""What the loader reads: samples of one shape with a class or captions each, images or cached latents."""

import hashlib
from pathlib import Path
from typing import Protocol

import numpy as np

from ldit.data.captions import Captions
from ldit.data.latent_cache.description import CacheDescription
from ldit.errors import DataError, some


class Samples(Protocol):
    """Samples of one shape with a class each. Reading must be safe from several threads at once."""

    @property
    def root(self) -> Path:
        """The folder, for messages."""
        ...

    @property
    def names(self) -> tuple[str, ...]:
        """Class names by index; empty for a set without classes, whose every label is 0."""
        ...

    @property
    def num_before_cap(self) -> int:
        """Number of samples before `max_per_class`."""
        ...

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a sample: (3, S, S) for images, (2C, h, w) for means and log-variances of latents."""
        ...

    @property
    def cache(self) -> CacheDescription | None:
        """Which images and which autoencoder the latents come from; None where the samples are images."""
        ...

    def __len__(self) -> int: ...

    def read(self, index: int, flip: bool, out: np.ndarray) -> int:
        """Fill `out`, float32 of `shape`, with sample `index`, mirrored left to right with `flip`; returns its class.
        DataError names what cannot be read."""
        ...

    def where(self, index: int) -> str:
        """The name of sample `index`: its path below `root`, or its place in a file."""
        ...

    def fingerprint(self) -> str:
        """Hex sha256 of the set and its order: equal for equal sets only."""
        ...

    def captions(self) -> Captions:
        """The captions of the samples, by `caption_row`. DataError says what has none."""
        ...

    def caption_row(self, index: int) -> int:
        """The place of sample `index` in `captions`, which training and held-out samples may share."""
        ...


class Unlabelled:
    """A set without its classes: no names, every label 0, the null class of a model without classes."""

    names: tuple[str, ...] = ()

    def __init__(self, data: Samples) -> None:
        self.data = data
        self.root, self.shape, self.num_before_cap, self.cache = data.root, data.shape, data.num_before_cap, data.cache

    def __len__(self) -> int:
        return len(self.data)

    def read(self, index: int, flip: bool, out: np.ndarray) -> int:
        """Fill `out` as the wrapped set does; returns 0."""
        self.data.read(index, flip, out)
        return 0

    def where(self, index: int) -> str:
        return self.data.where(index)

    def fingerprint(self) -> str:
        """That of the wrapped set: the samples are the same."""
        return self.data.fingerprint()

    def captions(self) -> Captions:
        return self.data.captions()

    def caption_row(self, index: int) -> int:
        return self.data.caption_row(index)


class Captioned(Unlabelled):
    """A set for text models: without classes, and with the row of its captions as the label of a sample."""

    def __init__(self, data: Samples) -> None:
        """DataError for a set without captions."""
        super().__init__(data)
        self._captions = data.captions()

    def read(self, index: int, flip: bool, out: np.ndarray) -> int:
        """Fill `out` as the wrapped set does; returns the row of the sample's captions."""
        self.data.read(index, flip, out)
        return self.data.caption_row(index)

    def captions(self) -> Captions:
        return self._captions

    def fingerprint(self) -> str:
        """sha256 of the samples and their captions."""
        return hashlib.sha256(f"{self.data.fingerprint()} {self._captions.fingerprint()}".encode()).hexdigest()


def fit_classes(data: Samples, num_classes: int) -> Samples:
    """The set for a model of `num_classes` classes, without labels for 0; DataError when the counts differ."""
    if num_classes == 0:
        return data if not data.names else Unlabelled(data)
    if not data.names:
        raise DataError(
            f"{data.root} holds images without classes, the model has num_classes {num_classes} "
            "(--model.num_classes 0 trains without classes)"
        )
    if num_classes != len(data.names):
        raise DataError(
            f"{data.root} has {len(data.names)} classes, the model has num_classes {num_classes} "
            f"(--model.num_classes {len(data.names)}); the classes are {some(data.names)}; --data.fit-model counts them"
        )
    return data
