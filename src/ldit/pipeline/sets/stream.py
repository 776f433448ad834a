"""Sets of images as streams of uint8 blocks: folders, .npz files, and images sampled from a model on the fly.

A set is cut into blocks of consecutive images. Each of n processes takes every n-th block, so that results do not
depend on n.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldit.checkpoint import export
from ldit.checkpoint.layouts import diffusers_dit, original
from ldit.checkpoint.run import run_is_begun
from ldit.config.requests.sampling import ModelRequest
from ldit.config.sections import DataConfig
from ldit.data.formats.image_folder import folders_in
from ldit.data.images.image_set import ImageSet
from ldit.data.samples import Samples
from ldit.data.source import BUNDLED, data_root, kind_of, open_data
from ldit.data.workers import Job, Stuck, Workers
from ldit.errors import DataError, EvaluationError
from ldit.pipeline.sets.description import (
    MOST_CLASSES,
    SetDescription,
    conditions,
    describe_array,
    describe_folder,
    is_in_the_making,
)
from ldit.pipeline.sets.folder import JOB
from ldit.pipeline.sets.make import SampleSet
from ldit.storage.npz import LABELS, members, open_images, read_array

PARTS = ("train", "heldout")
READERS = 2
MADE_OF_TEXT = "text"
"""The key of a set's description that says which text encoder made it."""


class ImageStream(Protocol):
    """A set of images of one size."""

    count: int
    labels: tuple[int, ...] | None
    """The class of each image, if known."""
    names: tuple[str, ...]
    """Class names by index, if known."""
    classes: int | None
    """The number of classes that the set could have, if known."""
    about: dict[str, Any]
    """What metrics depend on: which images, how they were sampled or cropped."""

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        ...

    def blocks(self, rank: int, size: int) -> Iterator[tuple[int, Tensor]]:
        """Yields (number of the first image, uint8 (b, 3, H, W) on the CPU) for each block of process `rank` of
        `size`."""
        ...

    def captions(self) -> list[str] | None:
        """The prompt or main caption of each image, if known."""
        ...


def is_images(source: str) -> bool:
    """Whether a source names images rather than a model: an .npz, a bundled set, PATH@train, PATH@heldout, or a folder
    that does not hold a model."""
    path = path_of(source)
    if source.endswith(".npz") or _split(source)[1] or str(path) in BUNDLED:
        return True
    is_one = (run_is_begun, original.is_original, export.is_export, diffusers_dit.is_pipeline)
    return path.is_dir() and not any(check(path) for check in is_one)


def check_there(source: str, name: str = "") -> None:
    """EvaluationError when a source of images does not exist, or is an .npz that is not complete. `name` is a word for
    it in messages."""
    path, label = path_of(source), f"{name} {source}".strip()
    if _split(source)[1] and path.suffix == ".npz":
        raise EvaluationError(f"{label}: an .npz has no parts, name it without @train or @heldout")
    try:
        exists = path.exists() or str(path) in BUNDLED
    except OSError:  # opening it reports why
        return
    if not exists and source.endswith(".npz") and is_in_the_making(path):
        raise EvaluationError(f"{label}: the set is not complete; rerun the same ldit sample command to finish it")
    if not exists:
        raise EvaluationError(f"{label}: no such file or folder")


def open_stream(source: str, num: int | None, side: int | None, block: int, heldout: str | None = None) -> ImageStream:
    """`num` images of `source` (None = all) in blocks of `block`. Images of folders are cropped to squares of `side`
    pixels by ADM's rule; None = the shorter side of the first image. `heldout`: the list or share that PATH@heldout and
    PATH@train go by; None = heldout.txt.

    EvaluationError or DataError name what is missing, damaged, or not enough.
    """
    for name, value in (("num", num), ("image_size", side), ("batch_size", block)):
        if value is not None and value < 1:
            raise EvaluationError(f"{name}: must be at least 1, got {value}")
    check_there(source)
    if source.endswith(".npz"):
        return NpzStream(source, num, block)
    return FolderStream(source, num, side, block, heldout)


class FolderStream:
    """Images of anything that `data.path` accepts. `PATH@heldout` is the held-out part, `PATH@train` the rest. Fewer
    images than all are evenly spaced, because a set is often sorted by class.

    A folder made by `ldit sample --num` states its labels. Of it, fewer images are the first ones, because its labels
    alternate.
    """

    def __init__(self, source: str, num: int | None, side: int | None, block: int, heldout: str | None = None) -> None:
        # A folder without images: an interrupted set, or a mistake.
        path, part = _split(source)
        root = data_root(path)
        description = describe_folder(root)
        if root.is_dir() and not folders_in(root) and kind_of(root) == "folders":  # no other kind matched
            if description is not None:
                raise _unfinished(root, 0, description)
            raise EvaluationError(f"{source}: holds no images")
        # Open it as training data, and take the part named.
        side = _size_of(path) if side is None else side
        train, kept = open_data(path, side, heldout if part else "")
        if part == "heldout" and kept is None:
            raise EvaluationError(f"{source}: {root} has no held-out images")
        self.data: ImageSet = kept if part == "heldout" and kept is not None else train
        # Choose the images.
        total = len(self.data)
        self.count = _enough(source, num, total)
        self.rows = list(range(self.count)) if description else [k * total // self.count for k in range(self.count)]
        self.block, self.side = block, side
        # Labels and names come from the description, else from the data.
        self.names = self.data.names
        self.classes = len(self.names) or None
        self.labels: tuple[int, ...] | None = None
        self.about = {"pictures": source, "count": self.count, "crop": f"{side}x{side} (ADM's crop)"}
        if description is not None:
            self._take(description, root)
        elif self.names:
            self.labels = tuple(map(self.data.label, self.rows))

    def _take(self, made: SetDescription, root: Path) -> None:
        """Take labels, names and conditions from the description of a set made by ldit. Labels go by the order of the
        images, so EvaluationError if the set is not complete or the folder holds other images."""
        total = len(self.data)
        stray = next((name for name in map(self.data.where, range(total)) if not made.is_own(name)), None)
        if stray is not None:
            raise EvaluationError(f"{root}: holds {stray} beside the {made.num} images of its {JOB}")
        if not made.complete or total < made.num:
            raise _unfinished(root, total, made)
        self.labels = None if made.labels is None else made.labels[: self.count]
        self.names, self.classes, self.about = made.names, made.classes, {**made.about, **self.about}

    @property
    def size(self) -> tuple[int, int]:
        return (self.side, self.side)

    def captions(self) -> list[str] | None:
        """The prompts of a set made by ldit, else the captions of the data."""
        if MADE_OF_TEXT in self.about:
            return _prompts(self)
        try:
            captions = self.data.captions()
        except DataError:
            return None
        return [captions.texts[captions.main(self.data.caption_row(row))] for row in self.rows]

    def blocks(self, rank: int, size: int) -> Iterator[tuple[int, Tensor]]:
        """Threads read the next block while the caller handles this one."""
        firsts = list(range(0, self.count, self.block))[rank::size]
        workers = Workers(READERS, "evaluate")
        try:
            waiting = [self._begin(first, workers) for first in firsts[:2]]
            for place, first in enumerate(firsts):
                if 0 < place < len(firsts) - 1:
                    waiting.append(self._begin(firsts[place + 1], workers))
                yield first, self._finish(first, *waiting.pop(0))
        finally:
            workers.close(1.0)

    def _begin(self, first: int, workers: Workers) -> tuple[np.ndarray, list[Job]]:
        """Start reading a block: its array (b, H, W, 3), and a job for each image."""
        rows = self.rows[first : first + self.block]
        out = np.empty((len(rows), self.side, self.side, 3), np.uint8)

        def read(place: int, job: Job) -> None:
            job.at(rows[place])
            out[place] = self.data[rows[place]][0]

        return out, [workers.submit(partial(read, place)) for place in range(len(rows))]

    def _finish(self, first: int, out: np.ndarray, jobs: list[Job]) -> Tensor:
        """Wait for a block."""
        for row, job in zip(self.rows[first:], jobs, strict=False):
            try:
                job.finish(DataConfig.timeout)
            except Stuck as stuck:
                raise DataError(f"{self.data.root}: {self.data.where(row)} cannot be read: {stuck}") from None
        return torch.from_numpy(out).permute(0, 3, 1, 2)


class TrainingStream:
    """The images of a run's training set, at most `most` of them, evenly spaced. Images that cannot be read are left
    out if `skip` is true."""

    def __init__(self, data: Samples, most: int, block: int, skip: bool) -> None:
        total = len(data)
        self.data, self.block, self.skip = data, block, skip
        self.count = min(total, most)
        self.rows = [k * total // self.count for k in range(self.count)]

    def blocks(self, rank: int, size: int) -> Iterator[tuple[int, Tensor]]:
        for first in range(rank * self.block, self.count, size * self.block):
            images = []
            for row in self.rows[first : first + self.block]:
                image = np.empty(self.data.shape, np.float32)
                try:
                    self.data.read(row, False, image)
                except DataError:
                    if not self.skip:
                        raise
                    continue
                images.append(np.rint((image + 1) * np.float32(127.5)).astype(np.uint8))
            if images:
                yield first, torch.from_numpy(np.stack(images))


class NpzStream:
    """The images `arr_0` of an .npz in ADM's format, uint8 (N, H, W, 3), with labels `arr_1` if present."""

    names: tuple[str, ...] = ()
    classes: int | None

    def __init__(self, source: str, num: int | None, block: int) -> None:
        path = path_of(source)
        self.images = open_images(path)
        self.count = _enough(source, num, len(self.images))
        self.block, self.classes = block, None
        self.labels = self._labels(path)
        # A set made by ldit has a description beside it.
        crc = self.images.member.info.CRC
        own = {"pictures": source, "crc32": f"{crc:08x}", "count": self.count, "crop": "none"}
        made = describe_array(path, crc, len(self.images))
        if made is not None:
            self.names, self.classes = made.names, made.classes
            if self.labels is None and made.labels is not None:
                self.labels = made.labels[: self.count]
        self.about = own if made is None else {**made.about, **own}

    def _labels(self, path: Path) -> tuple[int, ...] | None:
        """The labels of the images; None if there are none, or in another form than one integer an image."""
        member = members(path).get(LABELS)
        if member is None:
            return None
        if member.dtype.kind not in "iu" or member.shape != (len(self.images),):
            return None  # of another program; no metric needs them
        labels = read_array(member)[: self.count]
        for extreme in (labels.min(), labels.max()) if len(labels) else ():
            if not 0 <= int(extreme) < MOST_CLASSES:
                raise member.refuse(f"holds the label {extreme}")
        return tuple(labels.tolist())

    def captions(self) -> list[str] | None:
        return _prompts(self) if MADE_OF_TEXT in self.about else None

    @property
    def size(self) -> tuple[int, int]:
        height, width, _ = self.images.shape
        return (height, width)

    def blocks(self, rank: int, size: int) -> Iterator[tuple[int, Tensor]]:
        """Every process reads all of a compressed file, because that can only be read from its start. EvaluationError
        when the checksum of all images does not match, however few are used."""
        sequential = size == 1 or not self.images.stored
        if rank == 0 and not (sequential and self.count == len(self.images)):
            # No process reads all images in one pass, and zlib cannot combine checksums of parts. So one process reads
            # the file once more for its checksum, before the first block.
            self.images.verify()
        if sequential:
            every = enumerate(self.images.batches(self.block, 0, self.count))
            yield from ((i * self.block, _channels_first(rows)) for i, rows in every if i % size == rank)
            return
        for first in range(rank * self.block, self.count, size * self.block):
            for rows in self.images.batches(self.block, first, min(first + self.block, self.count)):
                yield first, _channels_first(rows)


def _prompts(stream: ImageStream) -> list[str] | None:
    """The prompts of images of a text model, whose labels are their numbers."""
    return None if stream.labels is None else [stream.names[label] for label in stream.labels]


class GeneratedStream:
    """Images sampled from a model block by block, not saved; the same images as those of `ldit sample --num`."""

    def __init__(self, request: ModelRequest, num: int) -> None:
        self.set = SampleSet(request, num)
        description = self.set.description
        self.count = num
        height, width = description["size"]
        self.size: tuple[int, int] = (height, width)
        conditioner = self.set.resolved.conditioner
        self.names = conditioner.names or ()
        self.classes: int | None = conditioner.count or None
        labels = self.set.labels
        self.labels = None if labels.rule is None else labels.of(range(num))
        self.about = {**conditions(description), "count": num}
        self.on_images: Callable[[float], None] = lambda count: None
        """Called with parts of images as they are made."""

    def captions(self) -> list[str] | None:
        return _prompts(self) if MADE_OF_TEXT in self.about else None

    def blocks(self, rank: int, size: int) -> Iterator[tuple[int, Tensor]]:
        """Reads the weights at the first block."""
        sampler = self.set.sampler()
        sampler.on_images = self.on_images
        with closing(sampler.blocks(range(rank, len(self.set.ranges), size))) as blocks:
            for block in blocks:
                yield block.rows.start, block.images


def _channels_first(rows: np.ndarray) -> Tensor:
    """uint8 (b, H, W, 3) -> (b, 3, H, W). The copy is writable, which a view of bytes is not."""
    return torch.from_numpy(rows.copy()).permute(0, 3, 1, 2)


def path_of(source: str) -> Path:
    """The path of a source, without the name of a part."""
    return Path(os.path.expanduser(_split(source)[0]))


def _unfinished(root: Path, count: int, made: SetDescription) -> EvaluationError:
    has = f"it has {count} of {made.num} images"
    return EvaluationError(f"{root}: the set is not complete, {has}; rerun the same ldit sample command to finish it")


def _split(source: str) -> tuple[str, str]:
    """PATH@train or PATH@heldout -> (PATH, part)."""
    path, mark, part = source.rpartition("@")
    return (path, part) if mark and part in PARTS else (source, "")


def _size_of(path: str) -> int:
    """The shorter side of the first image, from its header."""
    data, _ = open_data(path, 1, "")
    file = data.root / data.where(0)
    if not file.is_file():
        raise EvaluationError(f"{path}: state the size of its images (--image-size)")
    try:
        with Image.open(file) as image:
            return min(image.size)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot read image {file}: {error}") from None


def _enough(source: str, num: int | None, total: int) -> int:
    """The number of images to use of a source of `total`; EvaluationError if there are too few."""
    if not total:
        raise EvaluationError(f"{source}: holds no images")
    if num is not None and num > total:
        raise EvaluationError(f"{source}: holds {total} images, {num} are asked for")
    return total if num is None else num
