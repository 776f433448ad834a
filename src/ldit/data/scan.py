"""Scans a set of training images: decodes, hashes and counts every image; prints nothing."""

import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar, cast

from ldit.config.sections import DataConfig
from ldit.data.formats.heldout import read_list, unmatched_entries
from ldit.data.formats.image_folder import class_folders, files_in, folders_in, is_image, suffix_of
from ldit.data.formats.listed import ListedImages
from ldit.data.formats.names import path_key
from ldit.data.images.decoding import BadImage, Decoding, Facts, examine, opened
from ldit.data.images.image_set import ImageSet
from ldit.data.workers import Job, Stuck, Workers
from ldit.errors import DataError, LditError, RunError

_AT_ONCE = 1024  # images handed to the threads at once: jobs for a million images would take a gigabyte
MOST_HUNG = 8  # images that hang before the disk is blamed
Item = TypeVar("Item")


class Size(NamedTuple):
    """Size of one image, in pixels as stored in its file."""

    width: int
    height: int
    name: str


@dataclass
class Report:
    """The result of a scan. Names are paths below the folder, or the set's names for its images."""

    kind: str
    total: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)
    """(name, reason), in order."""
    problems: list[str] = field(default_factory=list)
    """Faults of the set itself, such as an empty class folder: each would stop a run at its start."""
    classes: Counter[str] = field(default_factory=Counter)
    """Images of each class, in a folder with the bad ones; empty for a set without classes."""
    heldout: int | None = None
    """Images that the held-out list keeps from training; None = there is no list."""
    unmatched: list[str] = field(default_factory=list)
    """Entries of the list that match no image."""
    others: Counter[str] = field(default_factory=Counter)
    """Suffix in small letters ("" = none) -> number of files of a folder that are not read as images."""
    formats: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    short_sides: Counter[int] = field(default_factory=Counter)
    """Power of two -> number of images whose short side is at least that and less than twice that."""
    smallest: Size | None = None
    """The first image with the shortest short side."""
    largest: Size | None = None
    """The first image with the most pixels."""
    enlarged: int = 0
    """Images whose short side is less than that of training."""
    oriented: int = 0
    """Images with an EXIF orientation other than 1."""
    animated: int = 0
    digests: dict[str, bytes] = field(default_factory=dict)
    """name -> sha256 of the file, for all files that could be read."""
    class_of: dict[str, str] = field(default_factory=dict)
    """name -> class, for images that have one."""

    @property
    def sound(self) -> bool:
        return not self.bad and not self.problems

    def duplicates(self) -> list[list[str]]:
        """Groups of names of files with the same content, in order."""
        groups: dict[bytes, list[str]] = {}
        for name, digest in self.digests.items():
            groups.setdefault(digest, []).append(name)
        return [names for names in groups.values() if len(names) > 1]

    def across_classes(self, group: Iterable[str]) -> bool:
        """Whether a group of duplicates is in more than one class."""
        return len({self.class_of.get(name) for name in group}) > 1

    def add(self, name: str, look: "_Look", size: int) -> None:
        """Add an image to the report; `size` is the side of training images, 0 = not known."""
        if look.digest is not None:
            self.digests[name] = look.digest
        facts = look.facts
        if facts is None:
            self.bad.append((name, look.reason))
            return
        self.formats[facts.format] += 1
        self.modes[facts.mode] += 1
        this, short = Size(facts.width, facts.height, name), min(facts.width, facts.height)
        self.short_sides[1 << (short.bit_length() - 1)] += 1
        if self.smallest is None or short < min(self.smallest[:2]):
            self.smallest = this
        if self.largest is None or facts.width * facts.height > self.largest.width * self.largest.height:
            self.largest = this
        self.enlarged += short < size
        self.oriented += facts.orientation != 1
        self.animated += facts.animated


class _Look(NamedTuple):
    """Hash and facts of one image; without facts it is bad, and `reason` says why."""

    digest: bytes | None
    facts: Facts | None
    reason: str


@dataclass(frozen=True)
class Reading:
    """How the files are read."""

    workers: int = 2
    """Threads."""
    timeout: float = DataConfig.timeout
    """Seconds that reading one file may take. A file that takes longer is bad, because it would end a run; a new thread
    reads the rest. RunError when MOST_HUNG files of one set hang."""
    seen: Callable[[int], object] | None = None
    """Called after each image with 1, the number of images that were checked since the last call."""


_PLAIN = Reading()


def scan_folder(root: Path, decoding: Decoding, size: int = 0, reading: Reading = _PLAIN, heldout: str = "") -> Report:
    """The report of a folder of class folders or of loose images; the same for any number of threads.

    `size`: the side of training images, 0 = not known. `heldout`: the held-out list in the folder, "" = none. DataError
    when the folder holds no images or cannot be listed.
    """
    # List all files: the images are decoded, the others counted.
    is_loose = any(map(is_image, files_in(root, deep=False)))
    folders = () if is_loose else folders_in(root)
    files = [*files_in(root, deep=False), *(f"{folder}/{f}" for folder in folders for f in files_in(root / folder))]
    names = sorted(filter(is_image, files), key=os.fsencode)
    if not names:
        raise DataError(f"no images in {root}")
    report = Report("class folders" if folders else "loose images", len(names))
    report.others.update(suffix_of(file) for file in files if not is_image(file))
    # The classes and the held-out list, then each image.
    if folders:
        _count_classes(report, root, folders, names)
    if heldout:
        _match_list(report, root / heldout, names)
    for name, look in zip(names, _in_order(lambda name: _look(root / name, decoding), names, reading), strict=True):
        report.add(name, look, size)
    return report


def _count_classes(report: Report, root: Path, folders: tuple[str, ...], names: list[str]) -> None:
    """Add the classes and their faults, by the rules of `ImageFolder`."""
    try:
        class_folders(root)
    except DataError as error:
        report.problems.append(str(error))
    report.class_of = {name: name.partition("/")[0] for name in names if "/" in name}
    report.classes.update(report.class_of.values())
    report.problems += [f"class folder {root / name} holds no images" for name in folders if not report.classes[name]]


def _match_list(report: Report, path: Path, names: list[str]) -> None:
    """Add what a held-out list matches, and its faults."""
    try:
        listed = read_list(path)
    except DataError as error:
        report.problems.append(str(error))
        return
    keys = set(map(path_key, listed))
    report.heldout = sum(path_key(name) in keys for name in names)
    report.unmatched = unmatched_entries(listed, names)
    if not report.heldout:
        report.problems.append(f"none of the {len(set(listed))} entries of {path} matches an image")


def scan_set(
    kind: str, sets: Iterable[ImageSet], decoding: Decoding, size: int = 0, reading: Reading = _PLAIN
) -> Report:
    """The report of sets other than folders of images. Images of IDX files have no format or size to report: only
    whether they can be read is checked. Bad images are not counted in their classes."""
    report = Report(kind)
    for images in sets:
        report.total += len(images)
        looks = _in_order(lambda index: _look_at(images, index, decoding), range(len(images)), reading, images.where)  # noqa: B023
        for index, look in enumerate(looks):
            name, is_file = images.where(index), isinstance(images, ListedImages)
            if is_file or look.reason:
                report.add(name, look, size)
            if images.names and not look.reason:
                report.class_of[name] = images.names[images.label(index)]
                report.classes[report.class_of[name]] += 1
    return report


def _look_at(images: ImageSet, index: int, decoding: Decoding) -> _Look:
    """Look at image `index` of a set."""
    try:
        if isinstance(images, ListedImages):
            return _look(images.source(index), decoding)
        images[index]
        return _Look(None, None, "")
    except LditError as error:
        return _Look(None, None, _short(error, images.root / images.where(index)))


def _look(source: Path | BinaryIO, decoding: Decoding) -> _Look:
    """Read and decode one image. It is bad also if the machine could not read it: then it was not checked."""
    digest = None
    try:
        if isinstance(source, Path):
            with opened(source) as file:
                return _look(file, decoding)
        digest = hashlib.file_digest(cast(BufferedReader, source), "sha256").digest()
        return _Look(digest, examine(source, decoding), "")
    except OSError as error:
        return _Look(digest, None, error.strerror or type(error).__name__)
    except (BadImage, LditError) as error:
        return _Look(digest, None, _short(error, getattr(source, "name", "") if digest else source))


def _short(error: Exception, path: object) -> str:
    """The reason without the image's name, which the report has beside it."""
    return str(error).removeprefix(f"cannot read image {path}: ")


class _Task:
    """One item that a thread looks at."""

    def __init__(self, look: Callable[[], _Look], workers: Workers) -> None:
        self.look, self.result = look, _Look(None, None, "")
        self.submit(workers)

    def submit(self, workers: Workers) -> None:
        self.job = workers.submit(self._run)

    def _run(self, job: Job) -> None:
        job.at(0)
        self.result = self.look()


def _in_order(
    look: Callable[[Item], _Look], items: Iterable[Item], reading: Reading, name: Callable[[Item], str] = str
) -> Iterator[_Look]:
    """The results of `look` for all items, in order, computed by threads. An item whose thread hangs is bad. RunError
    names the item when too many hang."""
    remaining, hung = iter(items), 0
    workers = Workers(reading.workers, "check")
    try:
        # A limited number of items at a time, so that results do not pile up.
        while some := list(itertools.islice(remaining, _AT_ONCE)):
            tasks = [_Task(lambda item=item: look(item), workers) for item in some]  # type: ignore[misc]
            for place, task in enumerate(tasks):
                try:
                    task.job.finish(reading.timeout)
                    result = task.result
                except Stuck as stuck:
                    hung += 1
                    if hung == MOST_HUNG:
                        what = f"{name(some[place])} cannot be read: {stuck} (--timeout)"
                        raise RunError(f"{what}, and {MOST_HUNG - 1} before it hang as well") from None
                    result = _Look(None, None, str(stuck))
                    # The thread is lost. New threads take the items that none has begun; the old ones finish theirs.
                    workers.close(0.0)
                    workers = Workers(reading.workers, "check")
                    for later in tasks[place + 1 :]:
                        if not later.job.thread:
                            later.submit(workers)
                yield result
                if reading.seen is not None:
                    reading.seen(1)
    finally:
        workers.close(0.0)
