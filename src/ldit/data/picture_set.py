"""What a set of training pictures is to those who read it, and a labelled set for a model without classes."""

from pathlib import Path
from typing import Protocol

import numpy as np

from ldit.errors import DataError


class PictureSet(Protocol):
    """Pictures of one size with a class each. Reading must be safe from several threads at once."""

    @property
    def root(self) -> Path:
        """The folder, for messages."""
        ...

    @property
    def size(self) -> int:
        """Side of the pictures in pixels."""
        ...

    @property
    def names(self) -> tuple[str, ...]:
        """Class names by index; empty for a set without classes, whose every label is 0."""
        ...

    @property
    def found(self) -> int:
        """Pictures before `max_per_class`."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """(size, size, 3) uint8 RGB and its class; DataError names what cannot be read."""
        ...

    def fingerprint(self) -> str:
        """Hex sha256 that tells one set, in its order, from another."""
        ...


class Unlabelled:
    """A set without its classes: no names, every label 0, which is the null class of a model without classes."""

    names: tuple[str, ...] = ()

    def __init__(self, data: PictureSet) -> None:
        self.data = data
        self.root, self.size, self.found = data.root, data.size, data.found

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """(size, size, 3) uint8 and 0."""
        return self.data[index][0], 0

    def fingerprint(self) -> str:
        """That of the set inside: the pictures are the same."""
        return self.data.fingerprint()


def fit_classes(data: PictureSet, num_classes: int) -> PictureSet:
    """The set as a model of `num_classes` classes takes it: without labels for 0; DataError when the counts differ."""
    if num_classes == 0:
        return data if not data.names else Unlabelled(data)
    if not data.names:
        raise DataError(
            f"{data.root} holds pictures without classes, the model has num_classes {num_classes} "
            "(--model.num_classes 0 trains without classes)"
        )
    if num_classes != len(data.names):
        raise DataError(
            f"{data.root} has {len(data.names)} classes, the model has num_classes {num_classes} "
            f"(--model.num_classes {len(data.names)})"
        )
    return data
