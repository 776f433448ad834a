"""Labels that come with each image: numbers or class names, and which classes they make.

| labels of the set | classes                                                                                      |
|-------------------|----------------------------------------------------------------------------------------------|
| none              | none: names (), every label 0                                                                |
| integers          | 0 … the largest; each must occur. Names: lines of classes.txt or labels.txt, else the digits |
| names             | the different names, sorted byte-wise; no names file is read                                 |

A set that mixes two of the three is refused.
"""

import json
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ldit.data.formats.names import check_class_name, check_class_names
from ldit.errors import DataError

Label = int | str

NAME_FILES = ("classes.txt", "labels.txt")
LABEL_KEYS = ("label", "class", "cls")  # of a JSON object; the first one that is set counts
MOST_LABEL = (1 << 31) - 1
_NONE, _NUMBER, _NAME = range(3)


def label_of_text(text: bytes) -> Label:
    """The label in a label file: an integer, else a class name of one line. ValueError says what is wrong."""
    try:
        line = text.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise ValueError("its label is not UTF-8 text") from None
    digits = line.removeprefix("-")
    return checked_label(int(line) if digits.isascii() and digits.isdigit() else line)


def label_of_object(data: dict[str, Any]) -> Label | None:
    """The label of a JSON object, None where it has none. ValueError says what is wrong."""
    for key in LABEL_KEYS:
        if data.get(key) is not None:
            return checked_label(data[key])
    return None


def checked_label(label: object) -> Label:
    """`label` if it can be a class: a number from 0 to 2^31-1, or one line of text. ValueError says why not."""
    if isinstance(label, int) and not isinstance(label, bool):
        if not 0 <= label <= MOST_LABEL:
            raise ValueError(f"its label {str(label)[:20]} is not a class: those are 0 to {MOST_LABEL}")
        return label
    if not isinstance(label, str):
        raise ValueError(f"its label is a {type(label).__name__}, neither an integer nor a name")
    try:
        check_class_name(label)
    except ValueError as error:
        raise ValueError(f"its label {error}") from None
    return label


def json_object(text: bytes) -> dict[str, Any]:
    """The object a UTF-8 JSON text holds; ValueError with a short reason for anything else."""
    try:
        data = json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"broken JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"JSON that is a {type(data).__name__}, not an object")
    return data


def class_names(folder: Path) -> tuple[Path, tuple[str, ...]] | None:
    """The names file of a folder and its lines without blank ones; None where there is no such file."""
    path = next((folder / name for name in NAME_FILES if (folder / name).is_file()), None)
    if path is None:
        return None
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    names = tuple(stripped for line in lines if (stripped := line.strip()))
    if len(set(names)) != len(names):
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise DataError(f"{path}: class name {twice!r} occurs twice")
    check_class_names(path, names)
    return path, names


class LabelTable:
    """The labels of samples in order, 4 bytes each; `finish` makes classes of them."""

    def __init__(self) -> None:
        self._codes = array("i")  # a number, or the place of a name in `_texts`
        self._texts: dict[str, int] = {}
        self._first: dict[int, int] = {}  # kind -> the first sample with that kind of label

    def __len__(self) -> int:
        return len(self._codes)

    def add(self, label: Label | None) -> None:
        """Append the label of the next sample, a result of `checked_label`."""
        if label is None:
            kind, code = _NONE, 0
        elif isinstance(label, int):
            kind, code = _NUMBER, label
        else:
            kind, code = _NAME, self._texts.setdefault(label, len(self._texts))
        self._first.setdefault(kind, len(self._codes))
        self._codes.append(code)

    def finish(self, root: Path, folder: Path, where: Callable[[int], str]) -> tuple[np.ndarray, tuple[str, ...]]:
        """((N,) int32 labels, names). `root` and `where(i)` are for messages; `folder` may hold a names file."""
        if not self._codes:
            raise DataError(f"no images in {root}")
        self._refuse_mixture(root, where)
        codes = np.frombuffer(self._codes, np.int32).copy()
        if _NAME in self._first:
            return self._named(root, codes)
        if _NUMBER in self._first:
            return codes, _numbered(root, folder, codes)
        return codes, ()

    def _refuse_mixture(self, root: Path, where: Callable[[int], str]) -> None:
        """DataError for a set with labels of several kinds; it names a sample of each."""
        first = {kind: where(place) for kind, place in self._first.items()}
        if _NONE in first and len(first) > 1:
            labelled = first.get(_NUMBER) or first.get(_NAME)
            raise DataError(f"{root}: {first[_NONE]} has no label, {labelled} has one")
        if len(first) > 1:
            raise DataError(f"{root}: the label of {first[_NAME]} is a name, that of {first[_NUMBER]} a number")

    def _named(self, root: Path, codes: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
        """Labels and names of classes in byte order; `codes` number the names in the order in which they came."""
        names = sorted(self._texts, key=str.encode)
        check_class_names(root, names)
        places = np.empty(len(names), np.int32)
        for place, name in enumerate(names):
            places[self._texts[name]] = place
        return places[codes], tuple(names)


def _numbered(root: Path, folder: Path, codes: np.ndarray) -> tuple[str, ...]:
    """Names of the classes 0 … max; DataError when one of them has no image."""
    present = np.unique(codes)
    count = int(present[-1]) + 1
    if len(present) != count:
        absent = int((present != np.arange(len(present))).argmax())
        raise DataError(
            f"{root}: labels go to {count - 1}, which makes {count} classes, but {len(present)} occur; "
            f"class {absent} has no image"
        )
    named = class_names(folder)
    if named is None:
        return tuple(map(str, range(count)))
    path, names = named
    if len(names) != count:
        raise DataError(f"{path} names {len(names)} classes, the labels of {root} make {count}")
    return names
