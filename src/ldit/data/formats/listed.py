"""ListedImages: what image sets with an index share: the choice of images, reading, the fingerprint."""

import hashlib
from abc import abstractmethod
from collections.abc import Collection
from pathlib import Path
from typing import BinaryIO, Generic, Protocol, TypeVar

import numpy as np

from ldit.data.formats.image_folder import none_left, subset
from ldit.data.formats.names import path_key
from ldit.data.images.decoding import BadImage, Decoding, read_square
from ldit.data.images.image_set import ImageSet
from ldit.errors import DataError


class Index(Protocol):
    """All images of a set, before held-out lists and `max_per_class`."""

    @property
    def names(self) -> tuple[str, ...]:
        """Class names by index."""
        ...

    @property
    def labels(self) -> np.ndarray:
        """(N,) int32, the class of each listed image."""
        ...


IndexT = TypeVar("IndexT", bound=Index)


class ListedImages(ImageSet, Generic[IndexT]):
    """Images of an index, cut to `size` x `size` uint8 RGB, with a label each.

    `exclude` / `only` list names left out / alone used, in any spelling of `path_key`; `max_per_class` keeps a fixed
    random subset of each larger class. `index`: the set's index where it was read before. Memory: the index, and 4
    bytes for each image that is used.
    """

    def __init__(
        self,
        root: Path,
        size: int,
        decoding: Decoding,
        exclude: Collection[str] = (),
        only: Collection[str] | None = None,
        max_per_class: int = 0,
        index: IndexT | None = None,
    ) -> None:
        self.root, self.size, self.decoding = root, size, decoding
        self.index = self._open(index)
        self.names, self._labels = self.index.names, self.index.labels
        left_out, kept = frozenset(map(path_key, exclude)), None if only is None else frozenset(map(path_key, only))
        chosen = self._listed(left_out, kept)
        self.num_before_cap = len(chosen)
        if not self.num_before_cap:
            raise DataError(none_left(root, only))
        self._chosen = self._capped(chosen, max_per_class) if max_per_class else chosen

    @abstractmethod
    def _open(self, index: IndexT | None) -> IndexT:
        """The index of `root`: `index`, or read now where that is None."""

    @abstractmethod
    def _name(self, at: int) -> str:
        """The name of listed image `at`: its path below `root`."""

    @abstractmethod
    def _path(self, at: int) -> Path:
        """The path of listed image `at` for messages, from the working directory."""

    @abstractmethod
    def _source(self, at: int) -> Path | BinaryIO:
        """The file of listed image `at`. Safe from several threads."""

    def _aliases(self, at: int) -> tuple[str, ...]:
        """What the held-out lists may call image `at`."""
        return (self._name(at),)

    def _bytes(self, at: int) -> int | None:
        """Size in bytes of the file of image `at`; None where it is not known."""
        return None

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """(size, size, 3) uint8 and its class; DataError names an image that cannot be read."""
        at = int(self._chosen[index])
        try:
            image = read_square(self._source(at), self.size, self.decoding)
        except BadImage as error:
            raise DataError(f"cannot read image {self._path(at)}: {error}") from None
        return image, int(self._labels[at])

    def where(self, index: int) -> str:
        """Path of image `index` below `root`."""
        return self._name(int(self._chosen[index]))

    def aliases(self, index: int) -> tuple[str, ...]:
        return self._aliases(int(self._chosen[index]))

    def source(self, index: int) -> Path | BinaryIO:
        """The file of image `index`. RunError when its archive cannot be read."""
        return self._source(int(self._chosen[index]))

    def label(self, index: int) -> int:
        return int(self._labels[self._chosen[index]])

    def caption_row(self, index: int) -> int:
        return int(self._chosen[index])

    def fingerprint(self) -> str:
        """sha256 of a line for each image, in order: path, class, and size in bytes where it is known."""
        digest = hashlib.sha256()
        for at in self._chosen.tolist():
            size = self._bytes(at)
            line = f"{self._name(at)}\0{self._labels[at]}" + (f"\0{size}\n" if size is not None else "\n")
            digest.update(line.encode())
        return digest.hexdigest()

    def _listed(self, left_out: frozenset[str], kept: frozenset[str] | None) -> np.ndarray:
        """(M,) int32, the places in the index of the images that the held-out lists leave, in order."""
        places = np.arange(len(self._labels), dtype=np.int32)
        if not left_out and kept is None:
            return places
        return places[np.fromiter((self._fits(at, left_out, kept) for at in range(len(places))), bool, len(places))]

    def _fits(self, at: int, left_out: frozenset[str], kept: frozenset[str] | None) -> bool:
        aliases = tuple(map(path_key, self._aliases(at)))
        return left_out.isdisjoint(aliases) and (kept is None or not kept.isdisjoint(aliases))

    def _capped(self, chosen: np.ndarray, most: int) -> np.ndarray:
        """At most `most` of each class, in the order of the index."""
        labels = self._labels[chosen]
        by_class = chosen[np.argsort(labels, kind="stable")]
        parts = np.split(by_class, np.cumsum(np.bincount(labels))[:-1])
        for label, places in enumerate(parts):
            if len(places) > most:
                listed = {self._name(at): at for at in places.tolist()}
                kept = subset(list(listed), most, self.names[label] if self.names else "")
                parts[label] = np.array([listed[name] for name in kept], np.int32)
        return np.sort(np.concatenate(parts))
