"""Names of images and classes: when two mean the same, and which a class may have.

People type names in another form than the disk has them: macOS takes accents apart, Windows writes backslashes.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from unicodedata import normalize

from ldit.errors import DataError

MOST_NAME = 1000  # characters of a class name


def path_key(path: str) -> str:
    """What two spellings of a relative path have in common: accents composed (NFC), slashes, no leading "./"."""
    return normalize("NFC", path.replace("\\", "/")).removeprefix("./")


def check_class_name(name: str) -> None:
    """ValueError unless it is one line of text: a name goes into messages, image grids and JSON."""
    if not name or name.isspace():
        raise ValueError("is empty")
    if len(name) > MOST_NAME:
        raise ValueError(f"has {len(name)} characters; names go to {MOST_NAME}")
    if any(c < " " or "\ud800" <= c <= "\udfff" or c in "\x7f\x85\u2028\u2029" for c in name):
        raise ValueError("is not one line of text")


def check_class_names(where: Path, names: Sequence[str]) -> None:
    """DataError for a name that no class can have, and for two that are `twins`: a class chosen by name could be
    either."""
    for name in names:
        try:
            check_class_name(name)
        except ValueError as error:
            raise DataError(f"{where}: the class name {name[:80]!a} {error}") from None
    if (pair := twins(names)) is not None:
        raise DataError(f"{where}: the classes {pair[0]!r} and {pair[1]!r} differ {pair[2]}")


def twins(names: Iterable[str]) -> tuple[str, str, str] | None:
    """The first two names that some disks take for the same, and how they differ; None = there are no such names.

    They differ in case alone, or in whether an accent is a character of its own, which looks the same.
    """
    seen: dict[str, str] = {}
    for name in names:
        twin = seen.setdefault(normalize("NFC", name).casefold(), name)
        if twin != name:
            if twin.casefold() == name.casefold():
                return twin, name, "in case alone"
            return twin, name, f"in case or the Unicode form of accents alone: {twin!a}, {name!a}"
    return None
