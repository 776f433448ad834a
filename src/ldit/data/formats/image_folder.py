"""Folders of image files: class folders (class index = place of the folder's name in byte order), or loose files.

A class folder may be a link; folders below it that are links are ignored. So are hidden files and folders (.cache,
._1.png) and those that machines make (`MACHINE_FOLDERS`).
"""

import hashlib
import os
from abc import abstractmethod
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ldit.data.captions import Captions
from ldit.data.formats.names import check_class_names, path_key
from ldit.data.images.decoding import BadImage, Decoding, read_square
from ldit.data.images.image_set import ImageSet
from ldit.errors import DataError
from ldit.rng import generator

SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff", ".gif"}
MACHINE_FOLDERS = {
    "@eadir", "#recycle", "@recycle", "@recently-snapshot", "__macosx", "$recycle.bin", "system volume information",
    "network trash folder", "temporary items", "lost+found", "__pycache__",
}  # fmt: skip
"""Folders that network disks and programs make beside the user's own: thumbnails, deleted files. In small letters."""
COMPANIONS = {
    ".txt", ".caption", ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".xml", ".yaml", ".yml", ".md", ".html", ".log",
    ".py", ".sh", ".ini", ".db", ".lock", ".url", ".sha256", ".md5",
}  # fmt: skip
"""Suffixes of files that lie beside images and are none."""
PARTS = {"train", "training", "val", "valid", "validation", "dev", "eval", "test", "testing", "heldout", "held-out"}
"""Names of folders that are parts of a set rather than its classes."""
MEMORY_LIMIT = 1 << 28  # bytes of decoded images kept; larger sets are decoded at every visit
_DEFAULT = Decoding()


@dataclass(frozen=True)
class Listing:
    """The files of a folder, listed once."""

    names: tuple[str, ...]
    """Of the class folders; () for a set without classes."""
    images: dict[str, list[str]]
    """Class folder, or "" without classes -> its images' paths below it, in byte order."""
    unread: Counter[str] = field(default_factory=Counter)
    """Suffix in small letters ("" = none) -> number of files that are neither read as images nor companions of some."""
    captions: Captions | None = None
    """Once they are read."""

    def paths(self) -> Iterator[str]:
        """The paths of all images below the root."""
        for folder, files in self.images.items():
            yield from (f"{folder}/{file}" if folder else file for file in files)


def list_images(root: Path, with_classes: bool) -> Listing:
    """List the images of a folder of class folders, or of one without classes. DataError names a folder that is missing
    or holds none, or that cannot be listed: its images would be missing silently."""
    if not root.is_dir():
        raise DataError(f"no folder {root}")
    names = class_folders(root) if with_classes else ()
    images: dict[str, list[str]] = {}
    unread: Counter[str] = Counter()
    for name in names or ("",):
        files = list(files_in(root / name))
        images[name] = sorted(filter(is_image, files), key=os.fsencode)
        if not images[name]:
            raise DataError(f"class folder {root / name} holds no images" if name else f"no images in {root}")
        unread.update(suffix for file in files if not is_image(file) and (suffix := suffix_of(file)) not in COMPANIONS)
    return Listing(names, images, unread)


class _ImageFiles(ImageSet):
    """Image files cut to `size` x `size` uint8 RGB, with a label each.

    `exclude` / `only`: relative paths ("class/file.png") left out / alone used, in any spelling of `path_key`.
    `max_per_class` keeps a fixed random subset of each larger class. `listing`: that of `root`, where it is known.
    """

    def __init__(
        self,
        root: Path,
        size: int,
        exclude: Collection[str] = (),
        only: Collection[str] | None = None,
        max_per_class: int = 0,
        decoding: Decoding = _DEFAULT,
        listing: Listing | None = None,
    ) -> None:
        listing = self.listed(root) if listing is None else listing
        self.root, self.size, self.decoding, self._listing = root, size, decoding, listing
        self.files: list[str] = []
        """Paths below `root`, with slashes. Strings: a million Path objects would be half a gigabyte."""
        self.labels: list[int] = []
        self.names, self.num_before_cap = listing.names, 0
        left_out, kept = set(map(path_key, exclude)), None if only is None else set(map(path_key, only))
        # Take the images of each class: held-out lists first, then the cap, which counts the images that are left.
        for label, (folder, chosen) in enumerate(listing.images.items()):
            prefix = f"{folder}/" if folder else ""
            if left_out:
                chosen = [file for file in chosen if path_key(prefix + file) not in left_out]
            if kept is not None:
                chosen = [file for file in chosen if path_key(prefix + file) in kept]
            self.num_before_cap += len(chosen)
            if max_per_class and len(chosen) > max_per_class:
                chosen = subset(chosen, max_per_class, folder)
            self.files.extend(prefix + file for file in chosen)
            self.labels.extend([label] * len(chosen))
        if not self.files:
            raise DataError(none_left(root, only))
        self._rows: dict[str, int] | None = None  # of the captions
        # Small sets keep their decoded images in memory.
        self._memory: dict[int, np.ndarray] | None = {} if len(self.files) * size**2 * 3 <= MEMORY_LIMIT else None

    @classmethod
    @abstractmethod
    def listed(cls, root: Path) -> Listing:
        """The images of a folder of this kind. DataError as from `list_images`."""

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

    def source(self, index: int) -> Path:
        return self.root / self.files[index]

    def captions(self) -> Captions:
        """Those in files beside the images, of the whole listing."""
        if self._listing.captions is None:
            from ldit.data.formats.caption_files import captions_beside

            found = captions_beside(self.root, self._listing.paths())
            object.__setattr__(self._listing, "captions", found)  # held-out and training images share it
        assert self._listing.captions is not None
        return self._listing.captions

    def caption_row(self, index: int) -> int:
        if self._rows is None:
            self._rows = {path: row for row, path in enumerate(self._listing.paths())}
        return self._rows[self.files[index]]

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
    no class folders, a class without images, and classes that `class_folders` refuses."""

    @classmethod
    def listed(cls, root: Path) -> Listing:
        return list_images(root, with_classes=True)


class LooseImages(_ImageFiles):
    """The images of a folder without classes: no names, every label 0, and `max_per_class` counts all images as one
    class. DataError names a folder that is missing or holds no images."""

    @classmethod
    def listed(cls, root: Path) -> Listing:
        return list_images(root, with_classes=False)


def none_left(root: Path, only: Collection[str] | None) -> str:
    """Why a held-out list leaves a set empty: it lists all images, or, of the images that it lists, there is none."""
    if only is None:
        return f"no images left in {root} after the held-out list"
    first = next(iter(only), "")
    return f"{root}: none of the {len(only)} images of the held-out list is there, the first is {first!r}"


def class_folders(root: Path) -> tuple[str, ...]:
    """Names of the class folders in byte order. DataError when there are none, when two differ in case or Unicode form
    alone (some disks take them for one folder), when one cannot be the name of a class, and when the folders are the
    parts of a set, such as train and val."""
    names = folders_in(root)
    if not names:
        raise DataError(f"no class folders in {root}")
    check_class_names(root, names)
    parts = [name for name in names if name.lower() in PARTS]
    if parts == list(names) and (len(parts) > 1 or folders_in(root / parts[0])):
        training = next((name for name in parts if name.lower().startswith("train")), parts[0])
        raise DataError(
            f"{root} holds {', '.join(names)}: parts of a set, not classes; train on one of them "
            f"(data.path {root / training})"
        )
    return names


def folders_in(root: Path) -> tuple[str, ...]:
    """Names of the folders in `root` and of the links to folders, in byte order."""
    return tuple(sorted((entry.name for entry in entries(root) if is_folder(entry)), key=os.fsencode))


def is_image(name: str) -> bool:
    """Whether a file of this name is read as an image. Its content decides on the format."""
    return suffix_of(name) in SUFFIXES


def suffix_of(name: str) -> str:
    """The suffix in small letters, with its dot; "" where there is none."""
    return os.path.splitext(name)[1].lower()


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
    """The entries of a folder except hidden ones and MACHINE_FOLDERS; DataError when it cannot be listed."""
    try:
        with os.scandir(str(folder)) as listing:
            return [entry for entry in listing if entry.name[:1] != "." and entry.name.lower() not in MACHINE_FOLDERS]
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
