"""What a set of training images holds: every image decoded whole, hashed, counted. Reads, and prints nothing."""

import errno
import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO, Generic, NamedTuple, TypeVar, cast

from ldit.config.sections import DataConfig
from ldit.data.formats.image_folder import class_folders, files_in, folders_in, is_image
from ldit.data.formats.listed import ListedImages
from ldit.data.images.decoding import BadImage, Decoding, Facts, examine, opened
from ldit.data.images.image_set import ImageSet
from ldit.data.workers import Job, Stuck, Workers
from ldit.errors import DataError, LditError, RunError

_AT_ONCE = 1024  # images handed to the threads: a job each for a million would be a gigabyte
MOST_HUNG = 8  # images that hang before it is the disk that does
In = TypeVar("In")
Out = TypeVar("Out")
Seen = Callable[[int], object]
"""Told how many more images have been looked at."""


class Size(NamedTuple):
    """Of one image, in pixels as stored in its file."""

    width: int
    height: int
    name: str


@dataclass
class Report:
    """What was found. Names are paths below the folder, or what the set calls its images."""

    kind: str
    total: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)
    """(name, reason), in order."""
    problems: list[str] = field(default_factory=list)
    """Faults of the set as a whole: each would stop a run at its start."""
    classes: Counter[str] = field(default_factory=Counter)
    """Images of each class, in a folder bad ones too; empty for a set without classes."""
    beside: int = 0
    """Images that lie beside the class folders, which no run reads."""
    others: Counter[str] = field(default_factory=Counter)
    """Suffix, in small letters -> files of a folder that no run takes for images; "" = those without one."""
    formats: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    short_sides: Counter[int] = field(default_factory=Counter)
    """Power of two -> images whose short side is at least that and less than twice that."""
    smallest: Size | None = None
    """The first of those with the shortest short side."""
    largest: Size | None = None
    """The first of those with the most pixels."""
    enlarged: int = 0
    """Images whose short side is less than the size asked for."""
    oriented: int = 0
    """Images with an EXIF orientation other than 1."""
    animated: int = 0
    digests: dict[str, bytes] = field(default_factory=dict)
    """name -> sha256 of the file, of all that could be read."""
    labelled: dict[str, str] = field(default_factory=dict)
    """name -> class, of images whose class is not their folder."""

    def duplicates(self) -> list[list[str]]:
        """Groups of names with the same content, each and all in order."""
        groups: dict[bytes, list[str]] = {}
        for name, digest in self.digests.items():
            groups.setdefault(digest, []).append(name)
        return [names for names in groups.values() if len(names) > 1]

    def across_classes(self, group: Iterable[str]) -> bool:
        """Whether a group of duplicates lies in more than one class."""
        return bool(self.classes) and len({self.labelled.get(name) or class_of(name) for name in group}) > 1

    @property
    def sound(self) -> bool:
        return not self.bad and not self.problems


@dataclass(frozen=True)
class Difference:
    """A folder against a list of hashes; names in order."""

    changed: list[str]
    missing: list[str]
    new: list[str]
    unreadable: list[str]
    """Listed and there, with a content that nobody knows."""

    def __bool__(self) -> bool:
        return bool(self.changed or self.missing or self.new or self.unreadable)


class _Look(NamedTuple):
    digest: bytes | None
    facts: Facts | None
    reason: str


class _Hash(NamedTuple):
    digest: bytes | None
    there: bool


@dataclass(frozen=True)
class Reading:
    """How the files are read."""

    workers: int = 2
    """Threads."""
    timeout: float = DataConfig.timeout
    """Seconds that a thread may be at one file. One that takes longer is bad, as it would end a run; another thread
    goes on. RunError when MOST_HUNG files of one walk hang."""
    seen: Seen | None = None


_PLAIN = Reading()


def class_of(name: str) -> str:
    """The class folder of a path below the root, "" for an image beside them."""
    return name.partition("/")[0] if "/" in name else ""


def scan_folder(root: Path, decoding: Decoding, size: int = 0, reading: Reading = _PLAIN) -> Report:
    """The report of a folder of class folders or of loose images, the same for any number of threads.

    `size`, where given, is that of training. DataError when the folder holds no images or cannot be listed.
    """
    folders = folders_in(root)
    files = [*files_in(root, deep=False), *(f"{folder}/{f}" for folder in folders for f in files_in(root / folder))]
    names = sorted(filter(is_image, files), key=os.fsencode)
    if not names:
        raise DataError(f"no images in {root}")
    report = Report("loose images", len(names))
    report.others.update(os.path.splitext(file)[1].lower() for file in files if not is_image(file))
    if folders:
        _classes(report, root, folders, names)
    looks = _in_order(lambda name: _look(root / name, decoding), names, reading, _hung)
    for name, look in zip(names, looks, strict=True):
        _take(report, name, look, size)
    return report


def _classes(report: Report, root: Path, folders: tuple[str, ...], names: list[str]) -> None:
    """Counts and faults of the class folders, by the rules of `ImageFolder`."""
    try:
        class_folders(root)
    except DataError as error:
        report.problems.append(str(error))
    report.kind = "class folders"
    counts = Counter(map(class_of, names))
    report.beside = counts.pop("", 0)
    report.classes.update(counts)
    report.problems += [f"class folder {root / name} holds no images" for name in folders if not counts[name]]


def _look(source: Path | BinaryIO, decoding: Decoding) -> _Look:
    """Hash and facts of one image. What the machine could not do is a reason like any other: nobody has seen it."""
    if isinstance(source, Path):
        try:
            with opened(source) as file:
                return _look(file, decoding)
        except (BadImage, LditError) as error:
            return _Look(None, None, _short(error, source))
    digest = None
    try:
        digest = hashlib.file_digest(cast(BufferedReader, source), "sha256").digest()
        return _Look(digest, examine(source, decoding), "")
    except (BadImage, LditError) as error:
        return _Look(digest, None, _short(error, getattr(source, "name", "")))
    except OSError as error:
        return _Look(digest, None, error.strerror or type(error).__name__)


def _short(error: Exception, path: object) -> str:
    """A reason without the image's name, which stands beside it."""
    return str(error).removeprefix(f"cannot read image {path}: ")


def _hung(stuck: Stuck) -> _Look:
    return _Look(None, None, str(stuck))


def _take(report: Report, name: str, look: _Look, size: int) -> None:
    if look.digest is not None:
        report.digests[name] = look.digest
    if look.facts is None:
        report.bad.append((name, look.reason))
    else:
        _count(report, name, look.facts, size)


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


def scan_set(
    kind: str, sets: Iterable[ImageSet], decoding: Decoding, size: int = 0, reading: Reading = _PLAIN
) -> Report:
    """The report of sets that are no folders of class folders or loose images: of those whose images are files as
    that of a folder, of IDX files what can be read, by class. Bad images are not counted in their classes."""
    report = Report(kind)
    for pictures in sets:
        report.total += len(pictures)
        if isinstance(pictures, ListedImages):
            _scan_listed(report, pictures, decoding, size, reading)
            continue
        labels = _in_order(partial(_label, pictures), range(len(pictures)), reading, str, pictures.where)
        for index, label in enumerate(labels):
            if isinstance(label, str):
                report.bad.append((pictures.where(index), label))
            elif pictures.names:
                report.classes[pictures.names[label]] += 1
    return report


def _scan_listed(report: Report, pictures: ListedImages, decoding: Decoding, size: int, reading: Reading) -> None:
    def look(index: int) -> _Look:
        try:
            return _look(pictures.source(index), decoding)
        except LditError as error:
            return _Look(None, None, _short(error, pictures.root / pictures.where(index)))

    for index, found in enumerate(_in_order(look, range(len(pictures)), reading, _hung, pictures.where)):
        name = pictures.where(index)
        _take(report, name, found, size)
        if pictures.names:
            report.labelled[name] = pictures.names[pictures.label(index)]
            report.classes[report.labelled[name]] += found.facts is not None


def _label(pictures: ImageSet, index: int) -> int | str:
    """The class of an image that can be read, or why it cannot."""
    try:
        return pictures[index][1]
    except LditError as error:
        return str(error)


def compare(root: Path, report: Report, listed: Mapping[str, bytes], reading: Reading = _PLAIN) -> Difference:
    """A folder, of which this is the report, against a list of sha256. What the list names beside the images is
    hashed here."""
    seen = report.digests.keys() | {name for name, _ in report.bad}
    beside = [name for name in listed if name not in seen]
    hashes = dict.fromkeys(seen, _Hash(None, True)) | {name: _Hash(d, True) for name, d in report.digests.items()}
    hashes |= zip(beside, _in_order(lambda name: _hash(root / name), beside, reading, _unknown), strict=True)
    changed: list[str] = []
    missing: list[str] = []
    unreadable: list[str] = []
    for name in sorted(listed, key=os.fsencode):
        digest, there = hashes[name]
        if digest is None:
            (unreadable if there else missing).append(name)
        elif digest != listed[name]:
            changed.append(name)
    new = sorted(report.digests.keys() - listed.keys(), key=os.fsencode)
    return Difference(changed, missing, new, unreadable)


def _hash(path: Path) -> _Hash:
    try:
        os.stat(path)
        with opened(path) as file:
            return _Hash(hashlib.file_digest(file, "sha256").digest(), True)
    except OSError as error:
        return _Hash(None, error.errno not in (errno.ENOENT, errno.ENOTDIR))
    except (BadImage, LditError):
        return _Hash(None, True)


def _unknown(stuck: Stuck) -> _Hash:
    return _Hash(None, True)


class _Task(Generic[In, Out]):
    """One item for a thread."""

    result: Out
    job: Job

    def __init__(self, function: Callable[[In], Out], item: In) -> None:
        self.function, self.item = function, item

    def run(self, job: Job) -> None:
        job.at(0)
        self.result = self.function(self.item)


def _in_order(
    function: Callable[[In], Out],
    items: Iterable[In],
    reading: Reading,
    hung: Callable[[Stuck], Out],
    name: Callable[[In], str] = str,
) -> Iterator[Out]:
    """`function` of each item, in order, computed by threads; `hung` of one whose thread does not come back. RunError
    names the item when too many do not."""
    left, stuck_so_far = iter(items), 0
    workers = Workers(reading.workers, "check")
    try:
        while some := list(itertools.islice(left, _AT_ONCE)):
            tasks = [_Task(function, item) for item in some]
            for task in tasks:
                task.job = workers.submit(task.run)
            for place, task in enumerate(tasks):
                try:
                    task.job.finish(reading.timeout)
                    result = task.result
                except Stuck as stuck:
                    stuck_so_far += 1
                    if stuck_so_far == MOST_HUNG:
                        what = f"{name(task.item)} cannot be read: {stuck} (--timeout)"
                        raise RunError(f"{what}, and {MOST_HUNG - 1} before it hang as well") from None
                    result = hung(stuck)
                    workers.close(0.0)  # those that do not hang end with what they are at
                    workers = Workers(reading.workers, "check")
                    for later in tasks[place + 1 :]:
                        if not later.job.thread:  # begun by none
                            later.job = workers.submit(later.run)
                yield result
                if reading.seen is not None:
                    reading.seen(1)
    finally:
        workers.close(0.0)
