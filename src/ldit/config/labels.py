"""Class names to class indices."""

import operator
from collections.abc import Sequence
from typing import SupportsIndex
from unicodedata import normalize

from ldit.errors import RequestError, some


def resolve_label(label: SupportsIndex | str, num_classes: int, names: Sequence[str] | None) -> int:
    """The class index of a label: an index, or a string.

    A string is tried as an exact name, as a number, as a name in any case or Unicode form, and as a unique beginning.
    RequestError when none fits, and for every label when there are no classes.
    """
    if num_classes == 0:
        raise RequestError(f"class {label!r}: this model has no classes, it is sampled without labels")
    if not isinstance(label, str):
        return _checked(label, num_classes)
    if names is not None and label in names:
        return list(names).index(label)
    if label.isascii() and label.removeprefix("-").isdecimal():
        return _checked(int(label), num_classes)
    if names is None:
        raise RequestError(f"class {label!r}: this model has no class names; use numbers 0 to {num_classes - 1}")
    # A name in another case or Unicode form (macOS takes accents apart), else a unique beginning of one.
    folded = _folded(label)
    for matches in (
        [i for i, name in enumerate(names) if _folded(name) == folded],
        [i for i, name in enumerate(names) if _folded(name).startswith(folded)],
    ):
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise RequestError(f"class {label!r} is ambiguous: {some([names[i] for i in matches])}")
    raise RequestError(f"unknown class {label!r} (classes: {some(names, 12)})")


def resolve_labels(label: SupportsIndex | str, num_classes: int, names: Sequence[str] | None) -> tuple[int, ...]:
    """`resolve_label`, also for several labels with commas between them, as in "1,2,3". A name with a comma is one."""
    try:
        return (resolve_label(label, num_classes, names),)
    except RequestError:
        if not isinstance(label, str) or "," not in label or num_classes == 0:
            raise
        parts = [part.strip() for part in label.split(",") if part.strip()]
        if not parts:
            raise
        return tuple(resolve_label(part, num_classes, names) for part in parts)


def _folded(name: str) -> str:
    return normalize("NFC", name).casefold()


def _checked(label: SupportsIndex, num_classes: int) -> int:
    try:
        index = operator.index(label)
    except TypeError:
        raise RequestError(f"class label {label!r}: expected a number or a name") from None
    if not 0 <= index < num_classes:
        raise RequestError(f"class label {index} is out of range: this model has classes 0 to {num_classes - 1}")
    return index
