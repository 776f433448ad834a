"""Images of the original's text models: a YAML file that names lists, or one such list.

    META:
      - path: first.json        # or .jsonl: [{"path": …, "prompt": …}], or
        root: /images           # [{"image": …, "conversations": [{}, {"value": caption}]}], whose images are below root
        ratio: 0.5              # part of the list, chosen at random
        type: photos            # lists of one type follow each other

Paths are absolute, or relative to the working directory, or else to the folder of the YAML file. "prompt" and "value"
may also be lists of captions.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ldit.data.byte_strings import ByteStrings
from ldit.data.captions import Caption, Captions, CaptionTable, checked
from ldit.data.formats.listed import ListedImages
from ldit.data.formats.recognise import YAML
from ldit.errors import DataError

LINES = ".jsonl"
MOST_YAML = 1 << 20  # bytes
_KEYS = {"path": str, "type": str, "root": str, "ratio": (int, float)}


@dataclass(frozen=True)
class ImageList:
    """The images of all lists, in order."""

    root: Path
    """The folder to which relative paths that are not in the working directory refer."""
    paths: ByteStrings
    captions: Captions
    labels: np.ndarray
    names: tuple[str, ...] = field(default=())


class ImageListImages(ListedImages[ImageList]):
    """The images of the lists, with their captions. DataError names a list, and the entry in it, that cannot be read;
    missing images are bad ones (`data.bad`)."""

    def _open(self, index: ImageList | None) -> ImageList:
        return read_lists(self.root) if index is None else index

    def captions(self) -> Captions:
        return self.index.captions

    def _name(self, at: int) -> str:
        return self.index.paths[at].decode()

    def _path(self, at: int) -> Path:
        return _placed(self.index.root, self._name(at))

    def _source(self, at: int) -> Path:
        return self._path(at)


def read_lists(path: Path) -> ImageList:
    """The images of a YAML file of lists, or of one list. DataError says what is wrong with it."""
    root, paths, captions = path.parent, ByteStrings(), CaptionTable()
    lists = _lists(path) if path.suffix.lower() in YAML else [{"path": str(path)}]
    # Lists of one type follow each other, in the order in which the types first come.
    types = list(dict.fromkeys(entry.get("type", "default") for entry in lists))
    for entry in sorted(lists, key=lambda entry: types.index(entry.get("type", "default"))):
        file = _placed(root, entry["path"])
        rows = list(_rows(file, entry.get("root")))
        if "ratio" in entry:
            rows = random.Random(0).sample(rows, int(len(rows) * entry["ratio"]))
        for name, own in rows:
            paths.append(name.encode())
            captions.add(own)
    if not len(paths):
        raise DataError(f"{path} lists no images")
    return ImageList(root, paths, captions.finish(), np.zeros(len(paths), np.int32))


def _placed(root: Path, name: str) -> Path:
    """The file of a name: in the working directory, else below `root`."""
    path = Path(name).expanduser()
    return path if path.is_absolute() or path.exists() else root / path


def _lists(path: Path) -> list[dict[str, Any]]:
    """The entries of META, checked."""
    try:
        import yaml
    except ImportError:
        raise DataError(f"{path}: YAML files need the package PyYAML: pip install 'large-dit[text]'") from None
    try:
        with path.open("rb") as file:
            data = file.read(MOST_YAML + 1)
        if len(data) > MOST_YAML:
            raise ValueError(f"more than {MOST_YAML:,} bytes")
        content = yaml.safe_load(data.decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise DataError(f"cannot read {path}: {' '.join(str(error).split())[:200]}") from None
    lists = content.get("META") if isinstance(content, dict) else None
    if not isinstance(lists, list) or not lists:
        raise DataError(f"{path}: expected META, a list of lists of images")
    for number, entry in enumerate(lists):
        where = f"{path}: META[{number}]"
        if not isinstance(entry, dict) or "path" not in entry:
            raise DataError(f"{where} has no path")
        for key, value in entry.items():
            if key not in _KEYS:
                raise DataError(f"{where}: unknown key {key!r:.80} (known: {', '.join(_KEYS)})")
            if isinstance(value, bool) or not isinstance(value, _KEYS[key]):  # type: ignore[arg-type]
                raise DataError(f"{where}: {key} is a {type(value).__name__}")
        if not 0 < entry.get("ratio", 1) <= 1:
            raise DataError(f"{where}: ratio must be above 0 and at most 1, got {entry['ratio']}")
    return lists


def _rows(path: Path, root: str | None) -> Iterator[tuple[str, tuple[Caption, ...]]]:
    """(path of the image, its captions) of a list."""
    for number, entry in enumerate(_entries(path)):
        try:
            yield _row(entry, root)
        except ValueError as error:
            raise DataError(f"{path}, entry {number + 1}: {error}") from None


def _entries(path: Path) -> Iterator[Any]:
    try:
        if path.suffix.lower() != LINES:
            content = json.loads(path.read_text("utf-8-sig"))
            if not isinstance(content, list):
                raise DataError(f"{path} is a JSON {type(content).__name__}, expected a list of images")
            yield from content
            return
        with path.open(encoding="utf-8-sig") as file:
            for line in file:
                if line.strip():
                    yield json.loads(line)
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8 text") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: broken JSON: {error}") from None


def _row(entry: Any, root: str | None) -> tuple[str, tuple[Caption, ...]]:
    """An entry of either form; ValueError says what is wrong with it."""
    if not isinstance(entry, dict):
        raise ValueError(f"is a {type(entry).__name__}, not an object")
    if "path" in entry:
        return _name(entry["path"], "path"), checked(entry.get("prompt"))
    name = _name(entry.get("image"), "image")
    turns = entry.get("conversations")
    if not isinstance(turns, list) or len(turns) != 2 or not isinstance(turns[1], dict):
        count = len(turns) if isinstance(turns, list) else 0
        raise ValueError(f"conversations: expected 2 turns, got {count}")
    # The root is prepended to "image" alone.
    return name if root is None else f"{root.rstrip('/')}/{name.lstrip('/')}", checked(turns[1].get("value"))


def _name(name: Any, key: str) -> str:
    if not isinstance(name, str) or not name or "\0" in name or any("\ud800" <= c <= "\udfff" for c in name):
        raise ValueError(f"{key}: {name!r:.80} is not the path of an image")
    return name
