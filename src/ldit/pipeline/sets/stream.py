"""Sets of images as a stream of uint8 blocks: folders of all kinds, .npz files, and images of a model as they are
made.

A set is cut into blocks of consecutive images; of several processes each takes every n-th block, so that nothing
depends on their number.
"""

import os
from collections.abc import Iterator
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
from ldit.codecs.conditioners import build_conditioner
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
from ldit.storage.names import is_run
from ldit.storage.npz import LABELS, members, open_images, read_array

PARTS = ("train", "heldout")
READERS = 2


class ImageStream(Protocol):
    """A set of images of one size."""

    count: int
    labels: tuple[int, ...] | None
    """A class each, where known."""
    names: tuple[str, ...]
    """Class names by index, where known."""
    classes: int | None
    """How many classes the set could have, where known."""
    about: dict[str, Any]
    """What a figure depends on: which images, cut how."""

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        ...

    def blocks(self, rank: int, size: int) -> Iterator[tuple[int, Tensor]]:
        """(number of its first image, uint8 (b, 3, H, W) on the CPU): the share of process `rank` of `size`."""
        ...


def is_images(source: str) -> bool:
    """Whether a source names images and not a model: an .npz, a bundled set, PATH@heldout, or a folder without a
    model in it."""
    path = path_of(source)
    if source.endswith(".npz") or _split(source)[1] or str(path) in BUNDLED:
        return True
    model = is_run(path) or original.is_original(path) or export.is_export(path) or diffusers_dit.is_pipeline(path)
    return path.is_dir() and not model


def check_there(source: str, name: str = "") -> None:
    """EvaluationError where nothing lies at a source of images, or the blocks of an .npz that is being made. `name`
    is what it is called."""
    path, called = path_of(source), f"{name} {source}".strip()
    if _split(source)[1] and path.suffix == ".npz":
        raise EvaluationError(f"{called}: an .npz has no parts, name it alone")
    try:
        there = path.exists() or str(path) in BUNDLED
    except OSError:  # who opens it says why
        return
    if not there and source.endswith(".npz") and is_in_the_making(path):
        raise EvaluationError(f"{called}: a set that is not complete; the same ldit sample goes on with it")
    if not there:
        raise EvaluationError(f"{called}: no such file or folder")


def open_stream(source: str, num: int | None, side: int | None, block: int) -> ImageStream:
    """`num` images of `source`, None = all, in blocks of `block`. Images of folders are cut to squares of
    `side` pixels by the ADM crop, None = the shorter side of the first.

    EvaluationError or DataError name what is missing, damaged, or not enough.
    """
    for name, value in (("num", num), ("image_size", side), ("batch_size", block)):
        if value is not None and value < 1:
            raise EvaluationError(f"{name}: must be at least 1, got {value}")
    check_there(source)
    if source.endswith(".npz"):
        return NpzStream(source, num, block)
    return FolderStream(source, num, side, block)


class FolderStream:
    """Images of anything that `data.path` takes; fewer than all are spread over the set, whose order is often that of
    its classes. `PATH@heldout` is the part kept from training, `PATH@train` the rest. A folder made by
    `ldit sample --num` has its labels in it; fewer of its images are the first ones, for there labels take turns."""

    def __init__(self, source: str, num: int | None, side: int | None, block: int) -> None:
        path, part = _split(source)
        root = data_root(path)
        made = describe_folder(root)
        if root.is_dir() and not folders_in(root) and kind_of(root) == "folders":  # what is no other kind either
            if made is not None:
                raise _unfinished(root, 0, made)
            raise EvaluationError(f"{source}: holds no images")
        found = _size_of(path) if side is None else side
        train, heldout = open_data(path, found, None if part else "")
        if part == "heldout" and heldout is None:
            raise EvaluationError(f"{source}: {root} has no held-out images")
        self.data: ImageSet = heldout if part == "heldout" and heldout is not None else train
        total = len(self.data)
        self.count = _enough(source, num, total)
        self.rows = list(range(self.count)) if made else [k * total // self.count for k in range(self.count)]
        self.block, self.side = block, found
        self.names = self.data.names
        self.classes = len(self.names) or None
        self.labels: tuple[int, ...] | None = None
        self.about = {"pictures": source, "count": self.count, "crop": f"{found}x{found} (ADM's crop)"}
        if made is not None:
            self._take(made, root)
        elif self.names:
            self.labels = tuple(map(self.data.label, self.rows))

    def _take(self, made: SetDescription, root: Path) -> None:
        """What a set of ours says of itself; EvaluationError where it is not complete, or not alone: labels go by the
        place of an image."""
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

    def blocks(self, rank: int, size: int) -> Iterator[tuple[int, Tensor]]:
        """Read by threads, a block ahead."""
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
        rows = self.rows[first : first + self.block]
        out = np.empty((len(rows), self.side, self.side, 3), np.uint8)

        def read(place: int, job: Job) -> None:
            job.at(rows[place])
            out[place] = self.data[rows[place]][0]

        return out, [workers.submit(partial(read, place)) for place in range(len(rows))]

    def _finish(self, first: int, out: np.ndarray, jobs: list[Job]) -> Tensor:
        for row, job in zip(self.rows[first:], jobs, strict=False):
            try:
                job.finish(DataConfig.timeout)
            except Stuck as stuck:
                raise DataError(f"{self.data.root}: {self.data.where(row)} cannot be read: {stuck}") from None
        return torch.from_numpy(out).permute(0, 3, 1, 2)


class TrainingStream:
    """The images of a run's training set, at most `most` of them, spread over it. Those that cannot be read are left
    out where `skip` says so."""

    def __init__(self, data: Samples, most: int, block: int, skip: bool) -> None:
        total = len(data)
        self.data, self.block, self.skip = data, block, skip
        self.count = min(total, most)
        self.rows = [k * total // self.count for k in range(self.count)]

    def blocks(self, rank: int, size: int) -> Iterator[tuple[int, Tensor]]:
        for first in range(rank * self.block, self.count, size * self.block):
            found = []
            for row in self.rows[first : first + self.block]:
                image = np.empty(self.data.shape, np.float32)
                try:
                    self.data.read(row, False, image)
                except DataError:
                    if not self.skip:
                        raise
                    continue
                found.append(np.rint((image + 1) * np.float32(127.5)).astype(np.uint8))
            if found:
                yield first, torch.from_numpy(np.stack(found))


class NpzStream:
    """`arr_0` of an .npz, uint8 (N, H, W, 3), ADM's form of a set; `arr_1` are its labels, where there."""

    names: tuple[str, ...] = ()
    classes: int | None

    def __init__(self, source: str, num: int | None, block: int) -> None:
        path = path_of(source)
        self.images = open_images(path)
        self.count = _enough(source, num, len(self.images))
        self.block, self.classes = block, None
        self.labels = self._labels(path)
        crc = self.images.member.info.CRC
        own = {"pictures": source, "crc32": f"{crc:08x}", "count": self.count, "crop": "none"}
        made = describe_array(path, crc, len(self.images))
        if made is not None:
            self.names, self.classes = made.names, made.classes
            if self.labels is None and made.labels is not None:
                self.labels = made.labels[: self.count]
        self.about = own if made is None else {**made.about, **own}

    def _labels(self, path: Path) -> tuple[int, ...] | None:
        found = members(path).get(LABELS)
        if found is None:
            return None
        if found.dtype.kind not in "iu" or found.shape != (len(self.images),):
            return None  # somebody else's form of labels, which no figure needs
        labels = read_array(found)[: self.count]
        for worst in (labels.min(), labels.max()) if len(labels) else ():
            if not 0 <= int(worst) < MOST_CLASSES:
                raise found.refuse(f"holds the label {worst}")
        return tuple(labels.tolist())

    @property
    def size(self) -> tuple[int, int]:
        height, width, _ = self.images.shape
        return (height, width)

    def blocks(self, rank: int, size: int) -> Iterator[tuple[int, Tensor]]:
        """A packed file can only be read from its start, so every process reads all of it. EvaluationError where the
        checksum of all images is not theirs, however few of them are asked for."""
        through = size == 1 or not self.images.stored
        if rank == 0 and not (through and self.count == len(self.images)):
            # Nobody passes over all of them, and Python's zlib does not join the checksums of parts: one process reads
            # the file once more, before its first block.
            self.images.verify()
        if through:
            every = enumerate(self.images.batches(self.block, 0, self.count))
            yield from ((i * self.block, _channels_first(rows)) for i, rows in every if i % size == rank)
            return
        for first in range(rank * self.block, self.count, size * self.block):
            for rows in self.images.batches(self.block, first, min(first + self.block, self.count)):
                yield first, _channels_first(rows)


class GeneratedStream:
    """Images of a model, made block by block and kept nowhere; the same ones as those of `ldit sample --num`."""

    def __init__(self, request: ModelRequest, num: int) -> None:
        self.asked = SampleSet(request, num)
        said, spec = self.asked.description, self.asked.source.spec
        self.count = num
        height, width = said["size"]
        self.size: tuple[int, int] = (height, width)
        self.names = spec.class_names or ()
        self.classes: int | None = build_conditioner(spec).count or None
        dealt = self.asked.labels
        self.labels = None if dealt.rule is None else dealt.of(range(num))
        self.about = {**conditions(said), "count": num}

    def blocks(self, rank: int, size: int) -> Iterator[tuple[int, Tensor]]:
        """Reads the weights at the first block."""
        sampler = self.asked.sampler()
        with closing(sampler.blocks(range(rank, len(self.asked.ranges), size))) as made:  # type: ignore[type-var]
            for block in made:
                yield block.rows.start, block.images


def _channels_first(rows: np.ndarray) -> Tensor:
    """uint8 (b, H, W, 3), perhaps a view of bytes, -> (b, 3, H, W)."""
    return torch.from_numpy(rows.copy()).permute(0, 3, 1, 2)


def path_of(source: str) -> Path:
    """Where a source lies, whatever part of it is meant."""
    return Path(os.path.expanduser(_split(source)[0]))


def _unfinished(root: Path, there: int, made: SetDescription) -> EvaluationError:
    said = f"{there} of {made.num} images are there"
    return EvaluationError(f"{root}: a set that is not complete, {said}; the same ldit sample goes on with it")


def _split(source: str) -> tuple[str, str]:
    """PATH@train or PATH@heldout -> (PATH, part)."""
    path, mark, part = source.rpartition("@")
    return (path, part) if mark and part in PARTS else (source, "")


def _size_of(path: str) -> int:
    """The shorter side of the first image, from its header."""
    data, _ = open_data(path, 1, "")
    file = data.root / data.where(0)
    if not file.is_file():
        raise EvaluationError(f"{path}: say the size of its images (--image-size)")
    try:
        with Image.open(file) as image:
            return min(image.size)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot read image {file}: {error}") from None


def _enough(source: str, num: int | None, there: int) -> int:
    if not there:
        raise EvaluationError(f"{source}: holds no images")
    if num is not None and num > there:
        raise EvaluationError(f"{source}: holds {there} images, {num} are asked for")
    return there if num is None else num
