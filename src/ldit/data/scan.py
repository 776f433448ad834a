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
from ldit.data.formats.image_folder import class_folders, files_in, folders_in, is_image
from ldit.data.formats.listed import ListedImages
from ldit.data.images.decoding import BadImage, Decoding, Facts, examine, opened
from ldit.data.images.image_set import ImageSet
from ldit.data.workers import Job, Stuck, Workers
from ldit.errors import DataError, LditError, RunError

_AT_ONCE = 1024  # images handed to the threads: a job each for a million would be a gigabyte
MOST_HUNG = 8  # images that hang before it is the disk that does
Item = TypeVar("Item")


class Size(NamedTuple):
    """Of one image, in pixels as stored in its file."""

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
    """What is wrong with the set as a whole: each would stop a run at its start."""
    classes: Counter[str] = field(default_factory=Counter)
    """Images of each class, in a folder bad ones too; empty for a set without classes."""
    beside: int = 0
    """Images that lie beside the class folders, which no run reads."""
    others: Counter[str] = field(default_factory=Counter)
    """Suffix in small letters -> files of a folder that no run takes for images; "" = those without one."""
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
    class_of: dict[str, str] = field(default_factory=dict)
    """name -> class, of images that have one."""

    @property
    def sound(self) -> bool:
        return not self.bad and not self.problems

    def duplicates(self) -> list[list[str]]:
        """Groups of names with the same content, each and all in order."""
        groups: dict[bytes, list[str]] = {}
        for name, digest in self.digests.items():
            groups.setdefault(digest, []).append(name)
        return [names for names in groups.values() if len(names) > 1]

    def across_classes(self, group: Iterable[str]) -> bool:
        """Whether a group of duplicates is in more than one class."""
        return len({self.class_of.get(name) for name in group}) > 1

    def add(self, name: str, look: "_Look", size: int) -> None:
        """Count an image in; `size` is that of training, 0 = none."""
        if look.digest is not None:
            self.digests[name] = look.digest
        facts = look.facts
        if facts is None:
            self.bad.append((name, look.reason))
            return
        self.formats[facts.format] += 1
        self.modes[facts.mode] += 1
        here, short = Size(facts.width, facts.height, name), min(facts.width, facts.height)
        self.short_sides[1 << (short.bit_length() - 1)] += 1
        if self.smallest is None or short < min(self.smallest[:2]):
            self.smallest = here
        if self.largest is None or facts.width * facts.height > self.largest.width * self.largest.height:
            self.largest = here
        self.enlarged += short < size
        self.oriented += facts.orientation != 1
        self.animated += facts.animated


class _Look(NamedTuple):
    """What one image holds; without facts it is bad for a reason."""

    digest: bytes | None
    facts: Facts | None
    reason: str


@dataclass(frozen=True)
class Reading:
    """How the files are read."""

    workers: int = 2
    """Threads."""
    timeout: float = DataConfig.timeout
    """Seconds that a thread may be at one file. One that takes longer is bad, as it would end a run; another thread
    goes on. RunError when MOST_HUNG files of one set hang."""
    seen: Callable[[int], object] | None = None
    """Called with the number of further images that have been looked at."""


_PLAIN = Reading()


def scan_folder(root: Path, decoding: Decoding, size: int = 0, reading: Reading = _PLAIN) -> Report:
    """The report of a folder of class folders or of loose images, the same for any number of threads.

    `size`, where given, is that of training. DataError when the folder holds no images or cannot be listed.
    """
    folders = folders_in(root)
    files = [*files_in(root, deep=False), *(f"{folder}/{f}" for folder in folders for f in files_in(root / folder))]
    names = sorted(filter(is_image, files), key=os.fsencode)
    if not names:
        raise DataError(f"no images in {root}")
    report = Report("class folders" if folders else "loose images", len(names))
    report.others.update(os.path.splitext(file)[1].lower() for file in files if not is_image(file))
    if folders:
        _count_classes(report, root, folders, names)
    for name, look in zip(names, _in_order(lambda name: _look(root / name, decoding), names, reading), strict=True):
        report.add(name, look, size)
    return report


def _count_classes(report: Report, root: Path, folders: tuple[str, ...], names: list[str]) -> None:
    """Classes and what is wrong with them, by the rules of `ImageFolder`."""
    try:
        class_folders(root)
    except DataError as error:
        report.problems.append(str(error))
    report.class_of = {name: name.partition("/")[0] for name in names if "/" in name}
    report.classes.update(report.class_of.values())
    report.beside = len(names) - len(report.class_of)
    report.problems += [f"class folder {root / name} holds no images" for name in folders if not report.classes[name]]


def scan_set(
    kind: str, sets: Iterable[ImageSet], decoding: Decoding, size: int = 0, reading: Reading = _PLAIN
) -> Report:
    """The report of sets that are not folders of images: of those whose images are files, as of a folder; of IDX
    files, which images can be read. Bad images are not counted in their classes."""
    report = Report(kind)
    for images in sets:
        report.total += len(images)
        looks = _in_order(lambda index: _look_at(images, index, decoding), range(len(images)), reading, images.where)  # noqa: B023
        for index, look in enumerate(looks):
            name, listed = images.where(index), isinstance(images, ListedImages)
            if listed or look.reason:
                report.add(name, look, size)
            if images.names and not look.reason:
                report.class_of[name] = images.names[images.label(index)]
                report.classes[report.class_of[name]] += 1
    return report


def _look_at(images: ImageSet, index: int, decoding: Decoding) -> _Look:
    """Image `index` of a set."""
    try:
        if isinstance(images, ListedImages):
            return _look(images.source(index), decoding)
        images[index]
        return _Look(None, None, "")
    except LditError as error:
        return _Look(None, None, _short(error, images.root / images.where(index)))


def _look(source: Path | BinaryIO, decoding: Decoding) -> _Look:
    """Hash and facts of one image. Errors of the machine count as bad too, because the image was not checked."""
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
    """A reason without the image's name, which is shown beside it."""
    return str(error).removeprefix(f"cannot read image {path}: ")


class _Task:
    """One item for a thread."""

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
    """`look` of each item, in order, computed by threads. An item whose thread hangs is bad. RunError names the item
    when too many hang."""
    left, hung = iter(items), 0
    workers = Workers(reading.workers, "check")
    try:
        # A limited number of items at a time, so that results do not pile up.
        while some := list(itertools.islice(left, _AT_ONCE)):
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
