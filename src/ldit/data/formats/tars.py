"""Images in tar archives, in the WebDataset convention: members whose paths agree up to the first dot of the last
component are one sample.

| member of a sample                              | meaning                                                     |
|-------------------------------------------------|-------------------------------------------------------------|
| KEY.jpg jpeg jfif png webp bmp ppm tif tiff gif | the image, exactly one                                    |
| KEY.cls                                         | its label, a whole number or a name; stands before KEY.json |
| KEY.json                                        | an object; "label", "class" or "cls" is the label           |
| other endings, names without dot or led by one  | passed over                                                 |

A sample's members need not be neighbours. Archives are read by position: one pass over the headers makes the index,
each image is one read. Nothing is unpacked, nothing is written.
"""

import io
import os
import threading
from array import array
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ldit.data.formats.image_folder import SUFFIXES
from ldit.data.formats.labels import Label, LabelTable, json_object, label_of_object, label_of_text
from ldit.data.formats.listed import ByteStrings, ListedImages
from ldit.data.formats.tar_members import NEEDS_PLAIN, Archive, Member, Walk
from ldit.data.images.decoding import Decoding
from ldit.data.images.limits import unread
from ldit.errors import DataError, LditError, RunError

PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
MOST_IMAGE = 1 << 28  # bytes of an image's file: it is held in memory while it is decoded
MOST_LABEL = {b"cls": 4096, b"json": 1 << 20}  # bytes
MOST_OPEN = 64  # archives at once, beside those that threads are reading from
_IMAGES = frozenset(suffix[1:].encode() for suffix in SUFFIXES)


@dataclass(frozen=True)
class TarIndex:
    """Where each image of some archives lies. Memory: 28 bytes an image and its name."""

    tars: tuple[Path, ...]
    versions: tuple[tuple[int, int], ...]
    """Size and time of each archive when it was read."""
    names: tuple[str, ...]
    members: ByteStrings
    offsets: np.ndarray  # (N,) int64
    sizes: np.ndarray  # (N,) int32
    shards: np.ndarray  # (N,) int32, place in `tars`
    labels: np.ndarray  # (N,) int32

    def where(self, at: int) -> str:
        """ "shard.tar/key.jpg"."""
        return f"{self.tars[self.shards[at]].name}/{_text(self.members[at])}"


class TarImages(ListedImages):
    """The images of the *.tar files of a folder, or of one *.tar file, with their classes (`data.labels` has the
    rules). `exclude` / `only` list "shard.tar/key.jpg" or bare keys, which hold in every archive; `max_per_class` keeps
    a fixed random subset of each larger class. `index` is that of the same root, where it was made before.

    DataError names an archive, and the member, that is damaged, hostile, packed, or without what a sample needs.
    """

    def __init__(
        self,
        root: Path,
        size: int,
        decoding: Decoding,
        exclude: Collection[str] = (),
        only: Collection[str] | None = None,
        max_per_class: int = 0,
        index: TarIndex | None = None,
    ) -> None:
        self.index = read_tars(root) if index is None else index
        super().__init__(root, size, decoding, self.index.names, self.index.labels)
        self._open = _OpenArchives(self.index)
        self._choose(exclude, only, max_per_class)

    def _name(self, at: int) -> str:
        return self.index.where(at)

    def _path(self, at: int) -> Path:
        return self.index.tars[self.index.shards[at]] / _text(self.index.members[at])

    def _calls(self, at: int) -> tuple[str, ...]:
        key, _ = _split(self.index.members[at])
        return self._name(at), _text(key)

    def _bytes(self, at: int) -> int:
        return int(self.index.sizes[at])

    def _source(self, at: int) -> io.BytesIO:
        """In memory. RunError where the archive cannot be read or is not what it was: no fault of one image."""
        size = int(self.index.sizes[at])
        try:
            data = self._open.get(int(self.index.shards[at])).read(int(self.index.offsets[at]), size)
        except LditError as error:
            raise unread(self._path(at), str(error)) from None
        except MemoryError:
            raise unread(self._path(at), f"no memory for its {size} bytes") from None
        if len(data) != size:
            raise unread(self._path(at), "the archive has become shorter")
        return _InMemory(data, str(self._path(at)))


class _InMemory(io.BytesIO):
    """An image's file with its name, for messages."""

    def __init__(self, data: bytes, name: str) -> None:
        super().__init__(data)
        self.name = name


def has_tars(root: Path) -> bool:
    """Whether `root` is a tar archive or a folder of some, packed ones too: opening those says what is wrong."""
    if root.is_dir():
        return any(_is_tar(entry.name) for entry in os.scandir(root))
    return _is_tar(root.name) and root.exists()


def read_tars(root: Path) -> TarIndex:
    """The index of the archives of a folder, in byte order of their names, or of one archive."""
    if not root.exists():
        raise DataError(f"no folder or tar file {root}")
    entries = [root / name for name in os.listdir(root)] if root.is_dir() else [root]
    tars = tuple(sorted((path for path in entries if _is_tar(path.name)), key=os.fsencode))
    packed = next((path for path in tars if path.name.lower().endswith(PACKED)), None)
    if packed is not None:
        raise DataError(f"{packed} is packed: {NEEDS_PLAIN}")
    if not tars:
        raise DataError(f"no *.tar in {root}")
    found = _Found()
    for path in tars:
        found.take(Archive(path))
    labels, names = found.table.finish(root, root if root.is_dir() else root.parent, lambda at: found.where(tars, at))
    offsets, sizes, shards = (np.frombuffer(a, a.typecode).copy() for a in (found.offsets, found.sizes, found.shards))
    return TarIndex(tars, tuple(found.versions), names, found.members, offsets, sizes, shards, labels)


@dataclass
class _Found:
    """The index while it is made."""

    versions: list[tuple[int, int]] = field(default_factory=list)
    members: ByteStrings = field(default_factory=ByteStrings)
    offsets: "array[int]" = field(default_factory=lambda: array("q"))
    sizes: "array[int]" = field(default_factory=lambda: array("i"))
    shards: "array[int]" = field(default_factory=lambda: array("i"))
    table: LabelTable = field(default_factory=LabelTable)

    def where(self, tars: tuple[Path, ...], at: int) -> str:
        return f"{tars[self.shards[at]].name}/{_text(self.members[at])}"

    def take(self, archive: Archive) -> None:
        """Add the samples of the next archive, in the order of their images."""
        shard = _Shard(self, Walk(archive))
        for member in shard.walk:
            shard.take(member)
        shard.finish()
        self.versions.append(archive.version)


class _Shard:
    """The samples of one archive. The dictionaries are gone with it; what they hold is nothing that Python's collector
    of garbage would walk through, which doubles the time for a million samples."""

    def __init__(self, found: _Found, walk: Walk) -> None:
        self._found, self.walk = found, walk
        self._images: dict[bytes, int] = {}  # places in `found` by key, as all of these
        self._labels: dict[bytes, dict[bytes, Label | ValueError | None]] = {b"cls": {}, b"json": {}}
        self._dotted: dict[bytes, bytes] = {}  # images whose key ends at an earlier dot

    def take(self, member: Member) -> None:
        """An image or a label, or a member that is passed over."""
        key, ending = _split(member.name)
        if ending in _IMAGES:
            self._take_image(key, member)
        elif ending in self._labels:
            if key in self._labels[ending]:
                raise self.walk.refusal(member.name, "stands there twice")
            if member.size > MOST_LABEL[ending]:
                raise self.walk.refusal(member.name, f"has {member.size} bytes; labels go to {MOST_LABEL[ending]}")
            self._labels[ending][key] = self._read_label(member, ending)
        elif ending.rpartition(b".")[2] in _IMAGES:
            self._dotted.setdefault(key, member.name)

    def finish(self) -> None:
        """Give each image its label; refuse images and labels that would be lost without a word."""
        for key in self._images:
            self._found.table.add(self._label(key))
            self._found.shards.append(len(self._found.versions))
        for key, name in self._dotted.items():
            if key not in self._images:
                ends = f"a sample's name ends at the first dot, and {_text(key)!r} has no image"
                raise self.walk.refusal(name, f"would be lost: {ends}")
        for key in self._labels[b"cls"]:
            if key not in self._images:
                raise self.walk.refusal(key + b".cls", "is the label of no image")

    def _take_image(self, key: bytes, member: Member) -> None:
        found = self._found
        place = self._images.setdefault(key, len(found.members))
        if place != len(found.members):
            other = _text(found.members[place])
            raise self.walk.refusal(member.name, f"is a second image of its sample, after {other!r}")
        if member.size > MOST_IMAGE:
            raise self.walk.refusal(member.name, f"has {member.size} bytes; images go to {MOST_IMAGE}")
        found.members.append(member.name)
        found.offsets.append(member.offset)
        found.sizes.append(member.size)

    def _label(self, key: bytes) -> Label | None:
        """That of a sample. What is wrong with a .json is of no interest beside a .cls."""
        ending = b"cls" if key in self._labels[b"cls"] else b"json"
        label = self._labels[ending].get(key)
        if isinstance(label, ValueError):
            raise self.walk.refusal(key + b"." + ending, f"cannot be used: {label}")
        return label

    def _read_label(self, member: Member, ending: bytes) -> Label | ValueError | None:
        data = self.walk.read(member.offset, member.size)
        try:
            return label_of_text(data) if ending == b"cls" else label_of_object(json_object(data))
        except ValueError as error:
            return error.with_traceback(None)


class _OpenArchives:
    """Archives, opened when first asked for; the `MOST_OPEN` used last stay open."""

    def __init__(self, index: TarIndex) -> None:
        self._index = index
        self._held: OrderedDict[int, Archive] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, shard: int) -> Archive:
        """The archive for the time the caller holds it: one that makes room is closed by its last reader."""
        with self._lock:
            archive = self._held.pop(shard, None)
            if archive is None:
                archive = Archive(self._index.tars[shard])
                if archive.version != self._index.versions[shard]:
                    raise RunError(f"{archive.path} has changed since it was opened")
                while len(self._held) >= MOST_OPEN:
                    self._held.popitem(last=False)
            self._held[shard] = archive
            return archive


def _is_tar(name: str) -> bool:
    return name.lower().endswith((".tar", *PACKED)) and not name.startswith(".")


def _split(name: bytes) -> tuple[bytes, bytes]:
    """(key, ending in small letters): the path up to the first dot of its last component, and what follows.
    The ending is empty for a name without a dot, or led by one."""
    base = name.rfind(b"/") + 1
    dot = name.find(b".", base)
    return (name[:dot], name[dot + 1 :].lower()) if dot > base else (name, b"")


def _text(name: bytes) -> str:
    return name.decode(errors="backslashreplace")
