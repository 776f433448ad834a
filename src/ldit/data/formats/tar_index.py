"""The index of tar archives: offset and label of each image, from one pass over the headers, or from a saved index.

A saved index is used as long as name, size and time of each archive, and of the files that name classes, are the same.
"""

import hashlib
import json
import os
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ldit.data.byte_strings import ByteStrings
from ldit.data.captions import Captions
from ldit.data.formats.image_folder import SUFFIXES
from ldit.data.formats.labels import NAME_FILES, Label, LabelTable, json_object, label_of_object, label_of_text
from ldit.data.formats.recognise import PACKED, is_tar
from ldit.data.formats.tar_members import NEEDS_PLAIN, Archive, Member, members
from ldit.data.images.limits import MOST_BYTES
from ldit.errors import DataError
from ldit.log import logger
from ldit.storage.atomic import replaced

MOST_LABEL = {b"cls": 4096, b"json": 1 << 20}  # bytes
_VERSION = 1  # of the saved index
_IMAGES = frozenset(suffix[1:].encode() for suffix in SUFFIXES)


@dataclass(frozen=True)
class TarIndex:
    """Archive, offset, size and label of each image. Memory: 28 bytes an image, and its name."""

    tars: tuple[Path, ...]
    versions: tuple[tuple[int, int], ...]
    """Size and time of each archive when it was read."""
    names: tuple[str, ...]
    members: ByteStrings
    offsets: np.ndarray  # (N,) int64
    sizes: np.ndarray  # (N,) int32
    shards: np.ndarray  # (N,) int32, place in `tars`
    labels: np.ndarray  # (N,) int32
    captions: Captions | None = None
    """Once they are read."""

    def where(self, at: int) -> str:
        """ "shard.tar/key.jpg"."""
        return f"{self.tars[self.shards[at]].name}/{shown(self.members[at])}"

    def keep(self, root: Path, folder: Path) -> None:
        """Save the index of `root` in `folder`, unless it is there. If that fails, a warning is logged."""
        key = _key(root, self.tars, self.versions)
        if _kept(root, folder, self.tars, key) is not None:
            return
        head = json.dumps({"key": key, "names": self.names}).encode()
        arrays: dict[str, Any] = {
            "head": np.frombuffer(head, np.uint8),
            "offsets": self.offsets,
            "sizes": self.sizes,
            "shards": self.shards,
            "labels": self.labels,
            **self.members.arrays(),
        }
        try:
            with replaced(kept_index(root, folder)) as temporary, temporary.open("wb") as file:
                np.savez(file, **arrays)
        except OSError as error:
            logger.warning("the index of %s is not kept in %s: %s", root, folder, error.strerror)


def kept_index(root: Path, folder: Path) -> Path:
    """The file in `folder` for the index of the archives of `root`."""
    return folder / f"tar-index-{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:12]}.npz"


def _key(root: Path, tars: tuple[Path, ...], versions: tuple[tuple[int, int], ...]) -> list[object]:
    """What a saved index depends on: name, size and time of each archive and of the files that name classes."""
    stats = [(name, _version(_names_folder(root) / name)) for name in NAME_FILES]
    pairs = [*((tar.name, version) for tar, version in zip(tars, versions, strict=True)), *stats]
    return [_VERSION, *([name, *version] for name, version in pairs)]


def _version(path: Path) -> tuple[int, int]:
    """Size and time of a file; (-1, 0) where there is none, or where it cannot be looked at."""
    try:
        status = path.stat()
    except OSError:
        return -1, 0
    return status.st_size, status.st_mtime_ns


def _kept(root: Path, folder: Path, tars: tuple[Path, ...], key: list[object]) -> TarIndex | None:
    """The index saved in `folder`; None where there is none with this key, or where it is damaged."""
    try:
        with np.load(kept_index(root, folder), allow_pickle=False) as file:
            head = json.loads(bytes(file["head"]))
            if head["key"] != key:
                return None
            names = ByteStrings.of(file["text"], file["ends"])
            parts = (file[part] for part in ("offsets", "sizes", "shards", "labels"))
            return TarIndex(tars, tuple(map(_version, tars)), tuple(head["names"]), names, *parts)
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged .npz raises nearly anything
        logger.warning("the index %s is damaged and made again: %s", kept_index(root, folder), error)
        return None


def read_tars(root: Path, index_dir: Path | None = None) -> TarIndex:
    """The index of the archives of a folder, in byte order of their names, or of one archive. The one saved in
    `index_dir` is used if it is up to date."""
    # List the archives.
    if not root.exists():
        raise DataError(f"no folder or tar file {root}")
    entries = [root / name for name in os.listdir(root)] if root.is_dir() else [root]
    tars = tuple(sorted((path for path in entries if is_tar(path.name)), key=os.fsencode))
    packed = next((path for path in tars if path.name.lower().endswith(PACKED)), None)
    if packed is not None:
        raise DataError(f"{packed} is packed: {NEEDS_PLAIN}")
    if not tars:
        raise DataError(f"no *.tar in {root}")
    # Use the saved index of the same archives.
    if index_dir is not None:
        kept = _kept(root, index_dir, tars, _key(root, tars, tuple(map(_version, tars))))
        if kept is not None:
            return kept
    # Read all headers, then make classes of the labels.
    builder = _Builder()
    for path in tars:
        builder.take(Archive(path))
    labels, names = builder.table.finish(root, _names_folder(root), lambda at: builder.where(tars, at))
    offsets, sizes, shards = (
        np.frombuffer(a, a.typecode).copy() for a in (builder.offsets, builder.sizes, builder.shards)
    )
    return TarIndex(tars, tuple(builder.versions), names, builder.members, offsets, sizes, shards, labels)


def _names_folder(root: Path) -> Path:
    """The folder in which a file that names the classes is looked for."""
    return root if root.is_dir() else root.parent


@dataclass
class _Builder:
    """The index while headers are read. Columns of plain numbers, so that a million images take little memory."""

    versions: list[tuple[int, int]] = field(default_factory=list)
    members: ByteStrings = field(default_factory=ByteStrings)
    offsets: "array[int]" = field(default_factory=lambda: array("q"))
    sizes: "array[int]" = field(default_factory=lambda: array("i"))
    shards: "array[int]" = field(default_factory=lambda: array("i"))
    table: LabelTable = field(default_factory=LabelTable)

    def where(self, tars: tuple[Path, ...], at: int) -> str:
        return f"{tars[self.shards[at]].name}/{shown(self.members[at])}"

    def take(self, archive: Archive) -> None:
        """Add the samples of the next archive, in the order of their images."""
        shard = _Shard(self, archive)
        for member in members(archive):
            shard.take(member)
        shard.finish()
        self.versions.append(archive.version)


class _Shard:
    """The samples of one archive while its headers are read. Its dictionaries hold only values that Python's garbage
    collector does not track: otherwise a million samples take twice as long."""

    def __init__(self, builder: _Builder, archive: Archive) -> None:
        self._builder, self._archive = builder, archive
        self._images: dict[bytes, int] = {}  # places in the builder by key
        self._labels: dict[bytes, dict[bytes, Label | ValueError | None]] = {b"cls": {}, b"json": {}}
        self._dotted: dict[bytes, bytes] = {}  # images whose key ends at an earlier dot

    def take(self, member: Member) -> None:
        """Note the next member: an image, a label, or a file that is ignored."""
        key, ending = split_name(member.name)
        if ending in _IMAGES:
            self._take_image(key, member)
        elif ending in self._labels:
            if key in self._labels[ending]:
                raise self._archive.refusal(member.name, "occurs twice")
            if member.size > MOST_LABEL[ending]:
                raise self._archive.refusal(member.name, f"has {member.size} bytes; labels go to {MOST_LABEL[ending]}")
            self._labels[ending][key] = self._read_label(member, ending)
        elif ending.rpartition(b".")[2] in _IMAGES:
            self._dotted.setdefault(key, member.name)

    def finish(self) -> None:
        """Add labels and archive of the images to the index. DataError for images and labels that would be ignored
        although they look like some."""
        for key in self._images:
            self._builder.table.add(self._label(key))
            self._builder.shards.append(len(self._builder.versions))
        # x.v2.png has the key x, so it is no image of its own. If x has no image either, v2 was part of a name.
        for key, name in self._dotted.items():
            if key not in self._images:
                ends = f"a sample's name ends at the first dot, and {shown(key)!r} has no image"
                raise self._archive.refusal(name, f"would be lost: {ends}")
        for key in self._labels[b"cls"]:
            if key not in self._images:
                raise self._archive.refusal(key + b".cls", "is the label of no image")

    def _take_image(self, key: bytes, member: Member) -> None:
        builder = self._builder
        place = self._images.setdefault(key, len(builder.members))
        if place != len(builder.members):
            other = shown(builder.members[place])
            raise self._archive.refusal(member.name, f"is a second image of its sample, after {other!r}")
        if member.size > MOST_BYTES:
            raise self._archive.refusal(member.name, f"has {member.size} bytes; images go to {MOST_BYTES}")
        builder.members.append(member.name)
        builder.offsets.append(member.offset)
        builder.sizes.append(member.size)

    def _label(self, key: bytes) -> Label | None:
        """The label of a sample: of its .cls, else of its .json. Errors in a .json beside a .cls do not matter."""
        ending = b"cls" if key in self._labels[b"cls"] else b"json"
        label = self._labels[ending].get(key)
        if isinstance(label, ValueError):
            raise self._archive.refusal(key + b"." + ending, f"cannot be used: {label}")
        return label

    def _read_label(self, member: Member, ending: bytes) -> Label | ValueError | None:
        """The label in a file. An error is returned: it counts only if the sample uses this file."""
        data = self._archive.read(member.offset, member.size)
        try:
            return label_of_text(data) if ending == b"cls" else label_of_object(json_object(data))
        except ValueError as error:
            return error.with_traceback(None)


def split_name(name: bytes) -> tuple[bytes, bytes]:
    """(key, ending in small letters): the path up to the first dot of its last component, and what follows.
    The ending is empty for a hidden name or one without a dot."""
    base = name.rfind(b"/") + 1
    dot = name.find(b".", base)
    return (name[:dot], name[dot + 1 :].lower()) if dot > base else (name, b"")


def shown(name: bytes) -> str:
    """A member's name as text; bytes that are not UTF-8 are escaped."""
    return name.decode(errors="backslashreplace")
