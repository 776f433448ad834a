"""The kinds of data sets, a row each: how a folder of the kind is recognised and how it is opened.

The first row that recognises a path counts, so the order is part of the rules. A new kind is a file beside this one and
a row here. Hidden files are ignored.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

from ldit.data.formats.heldout import Make, Pair, default_list, share_of, with_heldout
from ldit.data.formats.image_folder import ImageFolder, LooseImages, entries, files_in, is_folder, is_image
from ldit.data.formats.recognise import (
    IDX_HELDOUT,
    PACKED,
    PARTS_OF_SET,
    STATE,
    has_idx,
    has_metadata,
    is_image_list,
    is_table,
    other_metadata,
)
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
    def loose(self) -> str | None:
        """The first image that is in no folder; None where there is none."""
        return next(filter(is_image, self.files), None)

    @cached_property
    def in_folder(self) -> str | None:
        """An image in one of the folders; None where there is none."""
        for folder in self.folders:
            with suppress(DataError):  # one that cannot be listed: a set of class folders names it when it is read
                if (name := next(filter(is_image, files_in(self.root / folder)), None)) is not None:
                    return f"{folder}/{name}"
        return None

    @cached_property
    def archive(self) -> str | None:
        """The first plain tar archive; None where there is none."""
        return next((name for name in self.files if name.lower().endswith(".tar")), None)


@dataclass(frozen=True)
class Format:
    """A kind of data set."""

    kind: str
    title: str
    """The name of the kind in messages."""
    is_here: Callable[[Contents], bool]
    """Whether a folder is of this kind, intact or not."""
    open: Callable[[Opening], Pair]
    """(training, held-out or None); DataError names what is missing or damaged."""
    reads: frozenset[str] = frozenset()
    """Which images of a folder the kind reads: "loose" ones, those "in folders", those in "archives"."""


def format_of(root: Path) -> Format:
    """The kind of a data path. A file is a tar archive; for a folder the first row that recognises it counts. A warning
    names other files that could be meant as images. DataError for a folder that cannot be listed, and for one that also
    holds images of another kind: those would be left out silently."""
    if not root.is_dir():
        return LISTS if is_image_list(root) else TARS
    listing = entries(root)
    folders = sorted((entry.name for entry in listing if is_folder(entry)), key=os.fsencode)
    contents = Contents(root, frozenset(entry.name for entry in listing), tuple(folders))
    try:
        form = next(row for row in FORMATS if row.is_here(contents))
    except OSError as error:
        raise DataError(f"cannot look into folder {root}: {error.strerror}") from None
    if (other := next(_left_out(form, contents), None)) is not None:
        raise DataError(
            f"{root} holds {_example(form, contents)} and {other}: which are the training images? Move the others "
            "elsewhere"
        )
    return form


def _left_out(form: Format, contents: Contents) -> Iterator[str]:
    """Images that a set of this kind would leave out, an example of each kind."""
    if "archives" not in form.reads and contents.archive is not None:
        yield f"the archive {contents.archive}"
    if "loose" not in form.reads and contents.loose is not None:
        yield f"the image {contents.loose}"
    if "in folders" not in form.reads and contents.in_folder is not None:
        yield f"the image {contents.in_folder}"


def _example(form: Format, contents: Contents) -> str:
    """A file of this kind that is in the folder."""
    if form.kind == "tars":
        return f"the archive {contents.archive}"
    image = contents.in_folder if form.kind == "folders" else contents.loose if form.kind == "loose" else None
    return form.title if image is None else f"the image {image}"


def _has_cache(contents: Contents) -> bool:
    """Caches without a manifest count too, recognised by their shards or by the job of an unfinished one."""
    return is_cache(contents.root) or JOB in contents.names or any(map(is_shard, contents.names))


def _has_tars(contents: Contents) -> bool:
    """Plain archives; packed ones only where there is nothing else, because the images beside them may be theirs."""
    if contents.archive is not None:
        return True
    packed = next((name for name in contents.files if name.lower().endswith(PACKED)), None)
    image = contents.loose or contents.in_folder
    if packed is not None and image is not None:
        logger.warning("%s is not read: %s and others are the training images", contents.root / packed, image)
    return packed is not None and image is None


def _has_tables(contents: Contents) -> bool:
    """Parquet files, but for a list of images in that format, or what `datasets` saved, where there are no images."""
    is_here = any(map(is_table, contents.files)) or not contents.names.isdisjoint((STATE, PARTS_OF_SET))
    return is_here and contents.loose is None and contents.in_folder is None


def _has_unread_list(contents: Contents) -> bool:
    """A list in a format that is not read, which opening refuses: the images would be read without their labels."""
    other = other_metadata(contents.root)
    if other is not None and contents.in_folder is not None:
        logger.warning("%s is not read: the folders beside it are the classes", contents.root / other)
    return other is not None and contents.in_folder is None


def _has_loose_images(contents: Contents) -> bool:
    """Loose images, and none in the folders beside them, which may hold captions."""
    return contents.loose is not None and contents.in_folder is None


def _open_cache(opening: Opening) -> Pair:
    raise DataError(f"data.path: {opening.root} is a latent cache, images are needed here")


def _open_idx(opening: Opening) -> Pair:
    """IDX files have a held-out set of their own."""
    root = opening.root
    share = share_of(opening.heldout) is not None  # the set has a part of its own
    if opening.heldout and not share:
        raise DataError(
            f"data.heldout: {root} holds IDX files, whose held-out set is {IDX_HELDOUT}-*; "
            f'{opening.heldout!r} cannot be used ("" = none)'
        )
    from ldit.data.formats.idx import IdxImages

    train = IdxImages(root, opening.size, max_per_class=opening.max_per_class)
    if (share or opening.heldout is None) and has_idx(root, IDX_HELDOUT):
        return train, IdxImages(root, opening.size, IDX_HELDOUT)
    return train, None


def _open_files(maker: Callable[[Opening], Make], opening: Opening) -> Pair:
    """A set of image files, split by a held-out list. `maker` reads once what both parts share."""
    folder = opening.root if opening.root.is_dir() else opening.root.parent
    heldout = opening.heldout
    if heldout is None:
        heldout = default_list(folder)
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


def _lists(opening: Opening) -> Make:
    from ldit.data.formats.image_lists import ImageListImages, read_lists

    index = read_lists(opening.root)
    return lambda exclude, only, most: ImageListImages(
        opening.root, opening.size, opening.decoding, exclude, only, most, index
    )


def _tables(opening: Opening) -> Make:
    from ldit.data.formats.tables import TableImages, read_tables

    if (opening.root / PARTS_OF_SET).exists():
        parts = sorted(entry.name for entry in entries(opening.root) if is_folder(entry))
        raise DataError(f"{opening.root} holds the parts {', '.join(parts)} of a set: name one of these folders")
    index = read_tables(opening.root)
    return lambda exclude, only, most: TableImages(
        opening.root, opening.size, opening.decoding, exclude, only, most, index
    )


def _files(kind: type[ImageFolder] | type[LooseImages], opening: Opening) -> Make:
    root = opening.root
    listing = kind.listed(root)
    if listing.unread:
        kinds = ", ".join(f"{suffix or 'no suffix'} {count}" for suffix, count in listing.unread.most_common())
        count = listing.unread.total()
        logger.warning("%s: %d file%s not read as images: %s", root, count, " is" if count == 1 else "s are", kinds)
    return lambda exclude, only, most: kind(root, opening.size, exclude, only, most, opening.decoding, listing)


LOOSE, IN_FOLDERS, ARCHIVES = frozenset({"loose"}), frozenset({"in folders"}), frozenset({"archives"})
TARS = Format("tars", "tar shards", _has_tars, partial(_open_files, _tars), ARCHIVES)
LISTS = Format("lists", "the original's lists", lambda c: False, partial(_open_files, _lists))
LIST = Format(
    "list",
    "a folder with metadata.jsonl",
    lambda c: has_metadata(c.root),
    partial(_open_files, _listed),
    LOOSE | IN_FOLDERS | ARCHIVES,  # it says itself which images it leaves out
)
FORMATS = (
    Format("cache", "a latent cache", _has_cache, _open_cache),
    Format("idx", "a set of IDX files", lambda c: has_idx(c.root), _open_idx),
    LIST,
    TARS,
    Format("tables", "tables of images", _has_tables, partial(_open_files, _tables)),
    replace(LIST, is_here=_has_unread_list),
    Format("loose", "loose images", _has_loose_images, partial(_open_files, partial(_files, LooseImages)), LOOSE),
    Format("folders", "class folders", lambda c: True, partial(_open_files, partial(_files, ImageFolder)), IN_FOLDERS),
)
