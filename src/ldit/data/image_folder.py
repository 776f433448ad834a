"""Folders of picture files: class folders (class index = place of the folder's name in byte order), or loose files."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ldit.data.transforms import to_array
from ldit.errors import DataError
from ldit.rng import generator

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff", ".gif"}
MEMORY_LIMIT = 1 << 28  # bytes of decoded pictures kept; larger sets are decoded at every visit


class _PictureFiles:
    """Picture files cut to `size` x `size` uint8 RGB, with a label each."""

    names: tuple[str, ...] = ()

    def __init__(self, root: Path, size: int, exclude: Sequence[str], only: Sequence[str] | None) -> None:
        if not root.is_dir():
            raise DataError(f"no folder {root}")
        self.root, self.size = root, size
        self.paths: list[Path] = []
        self.labels: list[int] = []
        self.found = 0
        """Pictures before `max_per_class`."""
        self._left_out, self._kept = set(exclude), None if only is None else set(only)
        self._memory: dict[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def fingerprint(self) -> str:
        """sha256 of the relative names in order: the same order of samples needs the same names."""
        names = "\n".join(path.relative_to(self.root).as_posix() for path in self.paths)
        return hashlib.sha256(os.fsencode(names)).hexdigest()

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """(size, size, 3) uint8 and its class; DataError names a picture that cannot be read."""
        if self._memory is not None and index in self._memory:
            return self._memory[index], self.labels[index]
        try:
            with Image.open(self.paths[index]) as picture:
                array = to_array(picture, self.size)
        except Exception as error:  # damaged pictures raise nearly anything in Pillow
            raise DataError(f"cannot read picture {self.paths[index]}: {error}") from None
        if self._memory is not None:
            self._memory[index] = array
        return array, self.labels[index]

    def _add(self, files: list[str], folder: str, label: int, most: int) -> None:
        """Those of `files`, relative to `folder`, that the lists leave; at most `most` of them, 0 = all."""
        prefix = f"{folder}/" if folder else ""
        chosen = [f for f in files if prefix + f not in self._left_out]
        if self._kept is not None:
            chosen = [f for f in chosen if prefix + f in self._kept]
        self.found += len(chosen)
        if most and len(chosen) > most:
            chosen = subset(chosen, most, folder)
        self.paths.extend(self.root / folder / f for f in chosen)
        self.labels.extend([label] * len(chosen))

    def _finish(self) -> None:
        if not self.paths:
            raise DataError(f"no pictures left in {self.root} after the held-out list")
        if len(self.paths) * self.size**2 * 3 <= MEMORY_LIMIT:
            self._memory = {}


class ImageFolder(_PictureFiles):
    """The pictures of a folder of class folders, with their class index.

    `exclude` / `only`: relative paths ("class/file.png") left out / alone used. `max_per_class` keeps a fixed random
    subset of each larger class. DataError names a folder that is missing, without classes, or a class without pictures.
    """

    def __init__(
        self,
        root: Path,
        size: int,
        exclude: Sequence[str] = (),
        only: Sequence[str] | None = None,
        max_per_class: int = 0,
    ) -> None:
        super().__init__(root, size, exclude, only)
        self.names = tuple(sorted((e.name for e in os.scandir(root) if e.is_dir()), key=os.fsencode))
        if not self.names:
            raise DataError(f"no class folders in {root}")
        for label, name in enumerate(self.names):
            files = pictures_in(root / name)
            if not files:
                raise DataError(f"class folder {root / name} holds no pictures")
            self._add(files, name, label, max_per_class)
        self._finish()


class LoosePictures(_PictureFiles):
    """The pictures of a folder without classes: no names, every label 0.

    `exclude` and `only` as for ImageFolder; `max_per_class` counts all pictures as one class. DataError names a folder
    that is missing or holds no pictures.
    """

    def __init__(
        self,
        root: Path,
        size: int,
        exclude: Sequence[str] = (),
        only: Sequence[str] | None = None,
        max_per_class: int = 0,
    ) -> None:
        super().__init__(root, size, exclude, only)
        files = pictures_in(root)
        if not files:
            raise DataError(f"no pictures in {root}")
        self._add(files, "", 0, max_per_class)
        self._finish()


def read_list(path: Path) -> list[str]:
    """Relative paths, one a line; blank lines and lines that start with # are passed over."""
    if not path.is_file():
        raise DataError(f"no held-out list {path}")
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def pictures_in(folder: Path) -> list[str]:
    """Relative names of the pictures below `folder`, in byte order."""
    found = []
    for base, folders, files in os.walk(folder):
        folders.sort()
        relative = Path(base).relative_to(folder)
        found += [(relative / f).as_posix() for f in files if Path(f).suffix.lower() in SUFFIXES]
    return sorted(found, key=os.fsencode)


def subset(files: list[str], count: int, name: str) -> list[str]:
    """`count` of the files of class `name`: a fixed random choice that depends on each file's own name alone."""
    return sorted(sorted(files, key=lambda f: generator(0, "subset", 0, f"{name}/{f}").initial_seed())[:count])
