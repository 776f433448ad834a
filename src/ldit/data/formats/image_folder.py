"""Folders of image files: class folders (class index = place of the folder's name in byte order), or loose files.

A class folder may be a link; folders below it that are links are ignored, and so are hidden files (.cache, .thumbnails,
._1.png).
"""

import hashlib
import os
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ldit.data.formats.labels import twins
from ldit.data.images.decoding import BadImage, Decoding, read_square
from ldit.data.images.image_set import ImageSet
from ldit.errors import DataError
from ldit.rng import generator

SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff", ".gif"}
MEMORY_LIMIT = 1 << 28  # bytes of decoded images kept; larger sets are decoded at every visit
_DEFAULT = Decoding()


class _ImageFiles(ImageSet):
    """Image files cut to `size` x `size` uint8 RGB, with a label each.

    `exclude` / `only`: relative paths ("class/file.png") left out / alone used. `max_per_class` keeps a fixed random
    subset of each larger class.
    """

    def __init__(
        self,
        root: Path,
        size: int,
        exclude: Sequence[str] = (),
        only: Sequence[str] | None = None,
        max_per_class: int = 0,
        decoding: Decoding = _DEFAULT,
    ) -> None:
        if not root.is_dir():
            raise DataError(f"no folder {root}")
        self.root, self.size, self.decoding = root, size, decoding
        self.files: list[str] = []
        """Paths below `root`, with slashes. Strings: a million Path objects would be half a gigabyte."""
        self.labels: list[int] = []
        self.names, self.num_before_cap = self._class_names(), 0
        left_out, kept = set(exclude), None if only is None else set(only)
        # Take the images of each class; without classes those of the folder itself.
        for label, folder in enumerate(self.names or ("",)):
            below = images_in(root / folder)
            if not below:
                raise DataError(f"class folder {root / folder} holds no images" if folder else f"no images in {root}")
            prefix = f"{folder}/" if folder else ""
            # Held-out lists first, then the cap: it counts the images that are left.
            chosen = [f for f in below if prefix + f not in left_out and (kept is None or prefix + f in kept)]
            self.num_before_cap += len(chosen)
            if max_per_class and len(chosen) > max_per_class:
                chosen = subset(chosen, max_per_class, folder)
            self.files.extend(prefix + f for f in chosen)
            self.labels.extend([label] * len(chosen))
        if not self.files:
            raise DataError(f"no images left in {root} after the held-out list")
        # Small sets keep their decoded images in memory.
        self._memory: dict[int, np.ndarray] | None = {} if len(self.files) * size**2 * 3 <= MEMORY_LIMIT else None

    @abstractmethod
    def _class_names(self) -> tuple[str, ...]:
        """Names of the class folders in `root`; () for a set without classes."""

    def __len__(self) -> int:
        return len(self.files)

    @property
    def paths(self) -> list[Path]:
        """The files, made anew at each call."""
        return [self.root / file for file in self.files]

    def where(self, index: int) -> str:
        """Path below `root`."""
        return self.files[index]

    def label(self, index: int) -> int:
        return self.labels[index]

    def fingerprint(self) -> str:
        """sha256 of the relative names in order: the same order of samples needs the same names."""
        return hashlib.sha256(os.fsencode("\n".join(self.files))).hexdigest()

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """(size, size, 3) uint8 and its class; DataError names an image that cannot be read."""
        if self._memory is not None and index in self._memory:
            return self._memory[index], self.labels[index]
        path = self.root / self.files[index]
        try:
            array = read_square(path, self.size, self.decoding)
        except BadImage as reason:
            raise DataError(f"cannot read image {path}: {reason}") from None
        if self._memory is not None:
            self._memory[index] = array
        return array, self.labels[index]


class ImageFolder(_ImageFiles):
    """The images of a folder of class folders, with their class index. DataError names a folder that is missing or has
    no class folders, a class without images, and two classes whose names `class_folders` refuses."""

    def _class_names(self) -> tuple[str, ...]:
        return class_folders(self.root)


class LooseImages(_ImageFiles):
    """The images of a folder without classes: no names, every label 0, and `max_per_class` counts all images as one
    class. DataError names a folder that is missing or holds no images."""

    def _class_names(self) -> tuple[str, ...]:
        return ()


def class_folders(root: Path) -> tuple[str, ...]:
    """Names of the class folders in byte order. DataError when there are none, or when two differ in case or Unicode
    form alone: some disks take them for one folder."""
    names = folders_in(root)
    if not names:
        raise DataError(f"no class folders in {root}")
    if (pair := twins(names)) is not None:
        raise DataError(f"class folders {root / pair[0]} and {root / pair[1]} differ {pair[2]}")
    return names


def folders_in(root: Path) -> tuple[str, ...]:
    """Names of the folders in `root` and of the links to folders, in byte order."""
    return tuple(sorted((entry.name for entry in entries(root) if is_folder(entry)), key=os.fsencode))


def images_in(folder: Path) -> list[str]:
    """Relative names of the images below `folder`, in byte order; folders that are links are ignored. DataError
    names a folder that cannot be listed: its images would be missing silently."""
    return sorted(filter(is_image, files_in(folder)), key=os.fsencode)


def is_image(name: str) -> bool:
    """Whether a file of this name is read as an image. Its content decides on the format."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def files_in(folder: Path, deep: bool = True) -> Iterator[str]:
    """Relative names of all files in `folder`, in no order. With `deep` also those in folders below it, except folders
    that are links."""
    return _below(str(folder), "", deep)


def _below(folder: str, prefix: str, deep: bool) -> Iterator[str]:
    for entry in entries(folder):
        if not is_folder(entry):
            yield prefix + entry.name
        elif deep and not entry.is_symlink():
            yield from _below(entry.path, f"{prefix}{entry.name}/", deep)


def entries(folder: Path | str) -> list[os.DirEntry[str]]:
    """The entries of a folder except hidden ones; DataError when it cannot be listed."""
    try:
        with os.scandir(str(folder)) as listing:
            return [entry for entry in listing if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"cannot list folder {folder}: {error.strerror}") from None


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def subset(files: list[str], count: int, name: str) -> list[str]:
    """`count` of the files of class `name`: a fixed random choice that depends on each file's own name alone."""
    return sorted(sorted(files, key=lambda f: generator(0, "subset", 0, f"{name}/{f}").initial_seed())[:count])
