"""ListedImages: what sets of listed image files share, such as held-out lists, caps and the fingerprint."""

import hashlib
from abc import abstractmethod
from array import array
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ldit.data.formats.image_folder import subset
from ldit.data.images.decoding import BadImage, Decoding, read_square
from ldit.data.images.image_set import ImageSet
from ldit.errors import DataError


class ByteStrings:
    """Many byte strings in one buffer: 8 bytes each beside their own."""

    def __init__(self, strings: Iterable[bytes] = ()) -> None:
        self._all, self._ends = bytearray(), array("q")
        for string in strings:
            self.append(string)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> bytes:
        return bytes(self._all[self._ends[index - 1] if index else 0 : self._ends[index]])

    def append(self, string: bytes) -> None:
        self._all += string
        self._ends.append(len(self._all))

    def arrays(self) -> dict[str, np.ndarray]:
        """The strings as "text" and "ends", for a file."""
        return {"text": np.frombuffer(self._all, np.uint8), "ends": np.frombuffer(self._ends, np.int64)}

    @classmethod
    def of(cls, text: np.ndarray, ends: np.ndarray) -> "ByteStrings":
        """Those of `arrays`."""
        strings = cls()
        strings._all += text.tobytes()
        strings._ends.frombytes(ends.astype(np.int64).tobytes())
        return strings


class ListedImages(ImageSet):
    """Images cut to `size` x `size` uint8 RGB, with a label each; `labels` (N,) int32 are those of all that are
    listed, before the held-out lists and `max_per_class`. Memory: 4 bytes for each image that is used."""

    def __init__(self, root: Path, size: int, decoding: Decoding, names: tuple[str, ...], labels: np.ndarray) -> None:
        self.root, self.size, self.names = root, size, names
        self.found = 0
        self._decoding, self._labels = decoding, labels
        self._chosen = np.empty(0, np.int32)

    @abstractmethod
    def _name(self, at: int) -> str:
        """The name of listed image `at`: its path below `root`."""

    @abstractmethod
    def _path(self, at: int) -> Path:
        """The same for messages, from the working directory."""

    @abstractmethod
    def _source(self, at: int) -> Path | BinaryIO:
        """Listed image `at`, to be decoded. Safe from several threads."""

    def _aliases(self, at: int) -> tuple[str, ...]:
        """What the held-out lists may call image `at`."""
        return (self._name(at),)

    def _bytes(self, at: int) -> int | None:
        """Bytes of the file of image `at`, where they are known."""
        return None

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """(size, size, 3) uint8 and its class; DataError names an image that cannot be read."""
        at = int(self._chosen[index])
        try:
            image = read_square(self._source(at), self.size, self._decoding)
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

    def fingerprint(self) -> str:
        """sha256 of a line for each image, in order: path, class, and size in bytes where it is known."""
        digest = hashlib.sha256()
        for at in self._chosen.tolist():
            size = self._bytes(at)
            line = f"{self._name(at)}\0{self._labels[at]}" + (f"\0{size}\n" if size is not None else "\n")
            digest.update(line.encode())
        return digest.hexdigest()

    def _choose(self, exclude: Collection[str], only: Collection[str] | None, most: int) -> None:
        """Use those that the lists leave, in their order; at most `most` of a class, 0 = all."""
        chosen = np.arange(len(self._labels), dtype=np.int32)
        left_out, kept = frozenset(exclude), None if only is None else frozenset(only)
        if left_out or kept is not None:
            fits = (self._fits(at, left_out, kept) for at in range(len(chosen)))
            chosen = chosen[np.fromiter(fits, bool, len(chosen))]
        self.found = len(chosen)
        if not self.found:
            raise DataError(f"no images left in {self.root} after the held-out list")
        self._chosen = self._capped(chosen, most) if most else chosen

    def _fits(self, at: int, left_out: frozenset[str], kept: frozenset[str] | None) -> bool:
        aliases = self._aliases(at)
        return left_out.isdisjoint(aliases) and (kept is None or not kept.isdisjoint(aliases))

    def _capped(self, chosen: np.ndarray, most: int) -> np.ndarray:
        labels = self._labels[chosen]
        by_class = chosen[np.argsort(labels, kind="stable")]
        parts = np.split(by_class, np.cumsum(np.bincount(labels))[:-1])
        for label, places in enumerate(parts):
            if len(places) > most:
                listed = {self._name(at): at for at in places.tolist()}
                kept = subset(list(listed), most, self.names[label] if self.names else "")
                parts[label] = np.array([listed[name] for name in kept], np.int32)
        return np.sort(np.concatenate(parts))
