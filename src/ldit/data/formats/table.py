"""The kinds of data sets, a row each: how a folder of the kind is recognised and how it is opened.

The first row that recognises a path counts, so the order is part of the rules. A new kind is a file beside this one and
a row here. Hidden files are ignored.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain
from pathlib import Path

from ldit.data.formats.heldout import HELDOUT, Make, Pair, with_heldout
from ldit.data.formats.image_folder import ImageFolder, LooseImages, entries, files_in, is_folder, is_image
from ldit.data.formats.recognise import IDX_HELDOUT, PACKED, has_idx, has_metadata, other_metadata
from ldit.data.images.decoding import Decoding
from ldit.data.latent_cache.description import JOB, is_cache, is_shard
from ldit.errors import DataError
from ldit.log import logger


@dataclass(frozen=True)
class Opening:
    """What to open: a folder and a run's settings for it."""

    root: Path
    size: int
    """Side of the images in pixels."""
    heldout: str | None = None
    """List of the images kept from training; "" = none, None = heldout.txt where there is one."""
    max_per_class: int = 0
    decoding: Decoding = field(default_factory=Decoding)
    index_dir: Path | None = None
    """Folder in which an index may have been saved."""


@dataclass(frozen=True)
class Contents:
    """The contents of a data path, by names alone."""

    root: Path
    names: frozenset[str]
    """Of files and folders."""
    folders: tuple[str, ...]
    """In byte order."""

    @cached_property
    def files(self) -> tuple[str, ...]:
        """In byte order."""
        return tuple(sorted(self.names.difference(self.folders), key=os.fsencode))

    @cached_property
    def image(self) -> str | None:
        """An image, loose or in a class folder; None where there is none."""
        below = (f"{folder}/{name}" for folder in self.folders for name in files_in(self.root / folder))
        return next(filter(is_image, chain(self.files, below)), None)


@dataclass(frozen=True)
class Format:
    """A kind of data set."""

    kind: str
    title: str
    """The name of the kind in messages."""
    is_here: Callable[[Contents], bool]
    """Whether a folder is of this kind, intact or not. DataError when it could be of several."""
    open: Callable[[Opening], Pair]
    """(training, held-out or None); DataError names what is missing or damaged."""


def format_of(root: Path) -> Format:
    """The kind of a data path. A file is a tar archive; for a folder the first row that recognises it counts. A warning
    names other files that could be meant as images. DataError for a folder that cannot be listed."""
    if not root.is_dir():
        return TARS
    listing = entries(root)
    folders = sorted((entry.name for entry in listing if is_folder(entry)), key=os.fsencode)
    contents = Contents(root, frozenset(entry.name for entry in listing), tuple(folders))
    try:
        return next(row for row in FORMATS if row.is_here(contents))
    except OSError as error:
        raise DataError(f"cannot look into folder {root}: {error.strerror}") from None


def _has_cache(contents: Contents) -> bool:
    """Caches without a manifest count too, recognised by their shards or by the job of an unfinished one."""
    return is_cache(contents.root) or JOB in contents.names or any(map(is_shard, contents.names))


def _has_tars_alone(contents: Contents) -> bool:
    """DataError for archives beside other images: half of the images would be ignored."""
    tars = [name for name in contents.files if name.lower().endswith(".tar")]
    packed = [name for name in contents.files if name.lower().endswith(PACKED)]
    if not (tars or packed):
        return False
    if contents.image is None:
        return True
    if tars:
        raise DataError(
            f"{contents.root} holds the archive {tars[0]} and the image {contents.image}: which are the training "
            "images? Move the others elsewhere"
        )
    logger.warning("%s is not read: %s and others are the training images", contents.root / packed[0], contents.image)
    return False


def _has_unread_list(contents: Contents) -> bool:
    """A list in a format that is not read, which opening refuses: the images would be read without their labels."""
    other = other_metadata(contents.root)
    if other is not None and contents.folders:
        logger.warning("%s is not read: the folders beside it are the classes", contents.root / other)
    return other is not None and not contents.folders


def _has_loose_images_alone(contents: Contents) -> bool:
    return not contents.folders and any(map(is_image, contents.files))


def _open_cache(opening: Opening) -> Pair:
    raise DataError(f"data.path: {opening.root} is a latent cache, images are needed here")


def _open_idx(opening: Opening) -> Pair:
    """IDX files have a held-out set of their own."""
    root = opening.root
    if opening.heldout:
        raise DataError(
            f"data.heldout: {root} holds IDX files, whose held-out set is {IDX_HELDOUT}-*; "
            f'{opening.heldout!r} cannot be used ("" = none)'
        )
    from ldit.data.formats.idx import IdxImages

    train = IdxImages(root, opening.size, max_per_class=opening.max_per_class)
    if opening.heldout is None and has_idx(root, IDX_HELDOUT):
        return train, IdxImages(root, opening.size, IDX_HELDOUT)
    return train, None


def _open_files(maker: Callable[[Opening], Make], opening: Opening) -> Pair:
    """A set of image files, split by a held-out list. `maker` reads once what both parts share."""
    folder = opening.root if opening.root.is_dir() else opening.root.parent
    heldout = opening.heldout
    if heldout is None:
        heldout = HELDOUT if (folder / HELDOUT).is_file() else ""
    return with_heldout(maker(replace(opening, heldout=heldout)), folder, heldout, opening.max_per_class)


def _tars(opening: Opening) -> Make:
    from ldit.data.formats.tar_index import read_tars
    from ldit.data.formats.tars import TarImages

    index = read_tars(opening.root, opening.index_dir)
    return lambda exclude, only, most: TarImages(
        opening.root, opening.size, opening.decoding, exclude, only, most, index
    )


def _listed(opening: Opening) -> Make:
    from ldit.data.formats.metadata import MetadataImages, read_metadata

    index = read_metadata(opening.root)
    return lambda exclude, only, most: MetadataImages(
        opening.root, opening.size, opening.decoding, exclude, only, most, index
    )


def _files(kind: type[ImageFolder] | type[LooseImages], opening: Opening) -> Make:
    return lambda exclude, only, most: kind(opening.root, opening.size, exclude, only, most, opening.decoding)


TARS = Format("tars", "tar shards", _has_tars_alone, partial(_open_files, _tars))
LIST = Format("list", "a folder with metadata.jsonl", lambda c: has_metadata(c.root), partial(_open_files, _listed))
FORMATS = (
    Format("cache", "a latent cache", _has_cache, _open_cache),
    Format("idx", "a set of IDX files", lambda c: has_idx(c.root), _open_idx),
    LIST,
    TARS,
    replace(LIST, is_here=_has_unread_list),
    Format("loose", "loose images", _has_loose_images_alone, partial(_open_files, partial(_files, LooseImages))),
    Format("folders", "class folders", lambda c: True, partial(_open_files, partial(_files, ImageFolder))),
)
