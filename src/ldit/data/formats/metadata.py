"""Images listed in metadata.jsonl, in the convention of Hugging Face's ImageFolder: a JSON object a line.

| key                              | meaning                                                                          |
|----------------------------------|----------------------------------------------------------------------------------|
| "file_name"                      | the image's path below the folder, in any spelling of `path_key`; required        |
| "label", "class" or "cls"        | its class, an integer or a name (`formats.labels` has the rules)                 |
| "text" or "caption"              | its caption, or a list of captions; see `data.captions`                          |
| "weights"                        | a weight for each caption of a list; by default they are equal                   |
| others                           | ignored                                                                          |

Blank lines and a byte order mark are ignored.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ldit.data.byte_strings import ByteStrings
from ldit.data.captions import Captions, CaptionTable
from ldit.data.formats.caption_files import captions_of_object
from ldit.data.formats.image_folder import files_in, is_image
from ldit.data.formats.labels import LabelTable, json_object, label_of_object
from ldit.data.formats.listed import ListedImages
from ldit.data.formats.names import path_key
from ldit.data.formats.recognise import METADATA, is_tar, other_metadata
from ldit.errors import DataError, some
from ldit.log import logger


@dataclass(frozen=True)
class MetadataIndex:
    """The content of a metadata.jsonl. Memory: 12 bytes an image, its file name, and its caption if any has one."""

    file_names: ByteStrings
    labels: np.ndarray  # (N,) int32
    names: tuple[str, ...]
    captions: Captions | str
    """Or why there are none: the first line without a caption."""


class MetadataImages(ListedImages[MetadataIndex]):
    """The images that metadata.jsonl lists, in its order, with their classes.

    Held-out lists name files. DataError names the line that is broken, lists an image twice, or lists one that is
    missing or outside of the folder.
    """

    def _open(self, index: MetadataIndex | None) -> MetadataIndex:
        return read_metadata(self.root) if index is None else index

    def captions(self) -> Captions:
        if isinstance(self.index.captions, str):
            raise DataError(self.index.captions)
        return self.index.captions

    def _name(self, at: int) -> str:
        return self.index.file_names[at].decode()

    def _path(self, at: int) -> Path:
        return self.root / self._name(at)

    def _source(self, at: int) -> Path:
        return self._path(at)


def read_metadata(root: Path) -> MetadataIndex:
    """The index of a folder's metadata.jsonl; DataError names a line that is broken or whose image is not there."""
    path = root / METADATA
    if not os.path.lexists(path):
        other = other_metadata(root)
        raise DataError(f"no {METADATA} in {root}" + (f": of {other} nothing is read" if other else ""))
    # A line at a time: the file name, which must be that of a file below the folder, its label and its caption.
    file_names, table, folders = ByteStrings(), LabelTable(), _Folders(root)
    seen: set[bytes] = set()
    captions, problem = CaptionTable(), ""
    for number, line in _lines(path):
        try:
            data = json_object(line)
            name = folders.find(_inside(data.get("file_name")))
            encoded = name.encode()
            if encoded in seen:
                raise ValueError(f"{name!r} is listed twice")
            table.add(label_of_object(data))
        except ValueError as error:
            raise DataError(f"{path}, line {number}: {error}") from None
        seen.add(encoded)
        file_names.append(encoded)
        # Captions matter to text models alone: for others a line without one is no error.
        if not problem:
            try:
                captions.add(captions_of_object(data))
            except ValueError as error:
                problem = f"{path}, line {number}: {error}"
    # The labels of all images together make the classes.
    labels, names = table.finish(path, root, lambda at: file_names[at].decode())
    _warn_of_unlisted(path, seen)
    return MetadataIndex(file_names, labels, names, problem or captions.finish())


def _warn_of_unlisted(path: Path, listed: set[bytes]) -> None:
    """Say how many images and archives of the folder the list leaves out."""
    try:
        files = [name for name in files_in(path.parent) if is_image(name) or is_tar(name)]
    except DataError:  # a folder that cannot be listed: what is in it is not read anyway
        return
    others = [name for name in files if name.encode(errors="surrogateescape") not in listed]
    if others:
        logger.warning(
            "%s lists %d images and leaves out %d other files of the folder: %s",
            path, len(listed), len(others), some(others, 3),
        )  # fmt: skip


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of those that are not blank."""
    if not path.is_file():
        raise DataError(f"{path} is not a file")
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").strip():
                    yield number, line
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


def _inside(name: object) -> str:
    """The "file_name" of a line as a plain path below the folder; ValueError when it is none."""
    if not isinstance(name, str):
        raise ValueError('no "file_name"' if name is None else f'"file_name" is a {type(name).__name__}, not a text')
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith(("/", "\\")) or ".." in path_key(name).split("/") or not parts:
        raise ValueError(f"{name!r} is not a path below the folder")
    if "\0" in name or any("\ud800" <= c <= "\udfff" for c in name):
        raise ValueError(f"{name!r} cannot be the name of a file")
    return "/".join(parts)


class _Folders:
    """The files below a folder, by any spelling of `path_key`. Each folder is scanned once, which is faster than a
    check of each file."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._real = os.path.realpath(root)
        self._files: dict[str, frozenset[str]] = {}
        self._spellings: dict[str, dict[str, str]] = {}  # folder -> key -> name on the disk

    def find(self, name: str) -> str:
        """The file's name as the disk has it; ValueError for one that is missing or outside of the folder."""
        folder, _, base = name.rpartition("/")
        if base in self._below(folder):
            return name
        spelled = self._spelled(path_key(name))
        folder, _, base = spelled.rpartition("/")
        if base not in self._below(folder):
            self._explain(name)
        return spelled

    def _below(self, folder: str) -> frozenset[str]:
        if folder not in self._files:
            self._files[folder] = self._scan(folder)
        return self._files[folder]

    def _spelled(self, key: str) -> str:
        """The path with this key, a part after the other as the disk spells it; `key` where there is none."""
        folder = ""
        for part in key.split("/"):
            if folder not in self._spellings:
                try:
                    names = os.listdir(os.path.join(self._root, folder))
                except OSError:
                    return key
                self._spellings[folder] = {path_key(name): name for name in names}
            folder = os.path.join(folder, self._spellings[folder].get(part, part))
        return folder

    def _scan(self, folder: str) -> frozenset[str]:
        """The files of a folder; of links, those that stay below the root."""
        path = os.path.join(self._root, folder)
        try:
            if not self._is_inside(path):
                return frozenset()
            with os.scandir(path) as entries:
                return frozenset(entry.name for entry in entries if self._is_own_file(entry))
        except OSError:
            return frozenset()

    def _is_own_file(self, entry: "os.DirEntry[str]") -> bool:
        try:
            return entry.is_file() and (not entry.is_symlink() or self._is_inside(entry.path))
        except OSError:  # a link to itself
            return False

    def _is_inside(self, path: str) -> bool:
        real = os.path.realpath(path)
        return real == self._real or real.startswith(os.path.join(self._real, ""))

    def _explain(self, name: str) -> None:
        path = os.path.join(self._root, name)
        if os.path.exists(path) and not self._is_inside(path):
            raise ValueError(f"{name!r} is a link that leads out of the folder")
        raise ValueError(f"{name!r} {'is not a file' if os.path.lexists(path) else 'does not exist'}")
