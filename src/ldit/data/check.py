"""What a set of training pictures holds: every picture decoded whole, hashed, counted. Reads, and prints nothing."""

import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from ldit.data.decoding import BadPicture, Decoding, Facts, examine, opened
from ldit.data.image_folder import class_folders, pictures_in
from ldit.data.picture_set import PictureSet
from ldit.errors import DataError

_AT_ONCE = 1024  # pictures handed to the threads: a future each for a million would be a gigabyte
In = TypeVar("In")
Out = TypeVar("Out")
Seen = Callable[[int], object]
"""Told how many more pictures have been looked at."""


class Size(NamedTuple):
    """Of one picture, in pixels as stored in its file."""

    width: int
    height: int
    name: str


@dataclass
class Report:
    """What was found. Names are paths below the folder, or what the set calls its pictures."""

    kind: str
    total: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)
    """(name, reason), in order."""
    problems: list[str] = field(default_factory=list)
    """Faults of the set as a whole: each would stop a run at its start."""
    classes: Counter[str] = field(default_factory=Counter)
    """Pictures of each class, in a folder bad ones too; empty for a set without classes."""
    beside: int = 0
    """Pictures that lie beside the class folders, which no run reads."""
    formats: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    short_sides: Counter[int] = field(default_factory=Counter)
    """Power of two -> pictures whose short side is at least that and less than twice that."""
    smallest: Size | None = None
    """The first of those with the shortest short side."""
    largest: Size | None = None
    """The first of those with the most pixels."""
    enlarged: int = 0
    """Pictures whose short side is less than the size asked for."""
    oriented: int = 0
    """Pictures with an EXIF orientation other than 1."""
    animated: int = 0
    digests: dict[str, bytes] = field(default_factory=dict)
    """name -> sha256 of the file, of all that could be read."""

    def duplicates(self) -> list[list[str]]:
        """Groups of names with the same content, each and all in order."""
        groups: dict[bytes, list[str]] = {}
        for name, digest in self.digests.items():
            groups.setdefault(digest, []).append(name)
        return [names for names in groups.values() if len(names) > 1]

    def across_classes(self, group: Iterable[str]) -> bool:
        """Whether a group of duplicates lies in more than one class."""
        return bool(self.classes) and len({class_of(name) for name in group}) > 1

    @property
    def sound(self) -> bool:
        return not self.bad and not self.problems


@dataclass(frozen=True)
class Difference:
    """A folder against a list of hashes; names in order."""

    changed: list[str]
    missing: list[str]
    new: list[str]

    def __bool__(self) -> bool:
        return bool(self.changed or self.missing or self.new)


class _Look(NamedTuple):
    digest: bytes | None
    facts: Facts | None
    reason: str


def class_of(name: str) -> str:
    """The class folder of a path below the root, "" for a picture beside them."""
    return name.partition("/")[0] if "/" in name else ""


def scan_folder(root: Path, decoding: Decoding, size: int = 0, workers: int = 2, seen: Seen | None = None) -> Report:
    """The report of a folder of class folders or of loose pictures, the same for any number of threads.

    `size`, where given, is that of training. DataError when the folder holds no pictures or cannot be listed.
    """
    names = pictures_in(root)
    if not names:
        raise DataError(f"no pictures in {root}")
    report = Report("loose pictures", len(names))
    _classes(report, root, names)
    looks = _in_order(lambda name: _look(root / name, decoding), names, workers, seen)
    for name, look in zip(names, looks, strict=True):
        if look.digest is not None:
            report.digests[name] = look.digest
        if look.facts is None:
            report.bad.append((name, look.reason))
        else:
            _count(report, name, look.facts, size)
    return report


def _classes(report: Report, root: Path, names: list[str]) -> None:
    """Counts and faults of the class folders, by the rules of `ImageFolder`."""
    try:
        folders = class_folders(root)
    except DataError as error:
        folders = tuple(sorted({class_of(name) for name in names} - {""}))
        if folders:
            report.problems.append(str(error))
    if not folders:
        return
    report.kind = "class folders"
    counts = Counter(map(class_of, names))
    report.beside = counts.pop("", 0)
    report.classes.update(counts)
    report.problems += [f"class folder {root / name} holds no pictures" for name in folders if not counts[name]]


def _look(path: Path, decoding: Decoding) -> _Look:
    digest = None
    try:
        with opened(path) as file:
            digest = hashlib.file_digest(file, "sha256").digest()
            return _Look(digest, examine(file, decoding), "")
    except BadPicture as error:
        return _Look(digest, None, str(error))
    except OSError as error:
        return _Look(digest, None, error.strerror or type(error).__name__)


def _count(report: Report, name: str, facts: Facts, size: int) -> None:
    report.formats[facts.format] += 1
    report.modes[facts.mode] += 1
    here, short = Size(facts.width, facts.height, name), min(facts.width, facts.height)
    report.short_sides[1 << (short.bit_length() - 1)] += 1
    if report.smallest is None or short < min(report.smallest[:2]):
        report.smallest = here
    if report.largest is None or facts.width * facts.height > report.largest.width * report.largest.height:
        report.largest = here
    report.enlarged += short < size
    report.oriented += facts.orientation != 1
    report.animated += facts.animated


def scan_set(kind: str, sets: Iterable[PictureSet], workers: int = 2, seen: Seen | None = None) -> Report:
    """The report of sets that are no folders of files: what can be read, by class, and what cannot."""
    report = Report(kind)
    for pictures in sets:
        report.total += len(pictures)
        looks = _in_order(partial(_read, pictures), range(len(pictures)), workers, seen)
        for index, (label, reason) in enumerate(looks):
            if reason:
                report.bad.append((pictures.where(index), reason))
            elif pictures.names:
                report.classes[pictures.names[label]] += 1
    return report


def _read(pictures: PictureSet, index: int) -> tuple[int, str]:
    try:
        return pictures[index][1], ""
    except DataError as error:
        return 0, str(error)


def compare(root: Path, digests: Mapping[str, bytes], listed: Mapping[str, bytes]) -> Difference:
    """A folder whose pictures have these sha256 against a list. What the list names beside them is hashed here."""
    changed, missing = [], []
    for name in sorted(listed, key=os.fsencode):
        digest = digests.get(name) or _digest(root / name)
        if digest is None:
            missing.append(name)
        elif digest != listed[name]:
            changed.append(name)
    return Difference(changed, missing, sorted(digests.keys() - listed.keys(), key=os.fsencode))


def _digest(path: Path) -> bytes | None:
    try:
        with opened(path) as file:
            return hashlib.file_digest(file, "sha256").digest()
    except (BadPicture, OSError):
        return None


def _in_order(function: Callable[[In], Out], items: Iterable[In], workers: int, seen: Seen | None) -> Iterator[Out]:
    """`function` of each item, in order, computed by so many threads."""
    left = iter(items)
    with ThreadPoolExecutor(max(1, workers), "check") as pool:
        while some := list(itertools.islice(left, _AT_ONCE)):
            for result in pool.map(function, some):
                yield result
                if seen is not None:
                    seen(1)
