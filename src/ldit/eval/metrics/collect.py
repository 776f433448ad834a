"""Collects features of a set over all ranks: moments always, rows if metrics need them."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ldit.errors import EvaluationError
from ldit.eval.features import Features
from ldit.eval.metrics.moments import Moments
from ldit.eval.metrics.scores import InceptionScore
from ldit.parallel.world import World


@dataclass(frozen=True)
class Collected:
    """Features of a set, merged over all ranks. `rows` (N, D) and `predicted` (N,), the class with the largest logit,
    are in the order of the images; they are on the main process only, and None if they were not kept."""

    pool: Moments
    spatial: Moments | None
    scores: InceptionScore | None
    rows: Tensor | None
    predicted: Tensor | None

    @property
    def count(self) -> int:
        return self.pool.count


class Collector:
    """Takes the features of this rank's share of a set of `total` images, batch by batch in any order. With a total of
    0, for an unknown number of images, only moments and scores are kept.

    Memory: moments take 8·D² bytes. With `keep_rows`, which precision, recall, KID and intervals need, add 4·D bytes an
    image on the host: for all images on the main process, for its share on another rank. `splits` (total,) are those
    of the Inception Score, where they are not its usual ones.
    """

    def __init__(self, world: World, total: int, keep_rows: bool, splits: Tensor | None = None) -> None:
        self.splits = splits
        self.world, self.keep_rows, self.keep_predicted = world, keep_rows, total > 0
        self.pool: Moments | None = None
        self.spatial: Moments | None = None
        self.scores: InceptionScore | None = None
        self._rows, self._predicted = _Ordered(world, total), _Ordered(world, total)

    def add(self, first: int, features: Features) -> None:
        """Features of consecutive images, of which `first` is the first. EvaluationError names an image whose features
        are not finite."""
        # The first batch decides which features there are.
        if self.pool is None:
            self.pool = Moments(features.pool.shape[1])
            self.spatial = None if features.spatial is None else Moments(features.spatial.shape[1])
            self.scores = None if features.logits is None else InceptionScore(assigned=self.splits)
        self.pool.add(features.pool, first)
        if self.spatial is not None and features.spatial is not None:
            self.spatial.add(features.spatial, first)
        if self.scores is not None and features.logits is not None:
            self.scores.add(first, features.logits)
            if self.keep_predicted:
                self._predicted.put(first, features.logits.argmax(1))
        if self.keep_rows:
            self._rows.put(first, features.pool.float())

    def merged(self) -> Collected:
        """The features of all ranks; all call it together. EvaluationError when no rank has seen an image."""
        # A rank may have no image: the others tell it which features there are.
        world = self.world
        if all(width is None for width in world.gather(None if self.pool is None else self.pool.width)):
            raise EvaluationError("there are no images")
        shapes = next(filter(None, world.gather(self._shapes())))
        # Merge each kind.
        pool = (self.pool or Moments(shapes[0])).merged(world)
        spatial = (self.spatial or Moments(shapes[1])).merged(world) if shapes[1] else None
        scores = (self.scores or InceptionScore(assigned=self.splits)).merged(world) if shapes[2] else None
        rows = self._rows.gathered() if self.keep_rows else None
        if self.keep_rows and pool.count != len(self._rows):
            raise ValueError(f"{len(self._rows)} images were announced, {pool.count} came")
        predicted = self._predicted.gathered() if shapes[2] and self.keep_predicted else None
        return Collected(pool, spatial, scores, rows, predicted)

    def _shapes(self) -> list[int] | None:
        """Width of pool features, width of spatial ones (0 = none), whether there are logits; None before an image."""
        if self.pool is None:
            return None
        return [self.pool.width, 0 if self.spatial is None else self.spatial.width, int(self.scores is not None)]


class _Ordered:
    """Rows that arrive in any order on several ranks, each part with the number of its first row. The main process
    writes them into one tensor at once: concatenating parts in the end would take twice the memory."""

    def __init__(self, world: World, total: int) -> None:
        self.world, self.total = world, total
        self._all: Tensor | None = None  # on the main process
        self._parts: list[tuple[int, Tensor]] = []

    def __len__(self) -> int:
        return self.total

    def put(self, first: int, rows: Tensor) -> None:
        """Keep rows; ValueError for rows beyond the last."""
        if not 0 <= first <= self.total - len(rows):
            raise ValueError(f"{self.total} images were announced, there are {first + len(rows)}")
        if self.world.is_main:
            self._place(list(rows.shape[1:]), rows.dtype)[first : first + len(rows)] = rows
        else:
            self._parts.append((first, rows.cpu()))

    def _place(self, shape: list[int], dtype: torch.dtype) -> Tensor:
        """The tensor for all rows, allocated when the shape of a row is known."""
        if self._all is None:
            self._all = torch.empty(self.total, *shape, dtype=dtype)
        return self._all

    def gathered(self) -> Tensor | None:
        """All rows in order on the main process; None on other ranks. All call it together."""
        # The main process learns what each rank has, then receives part by part.
        heads = self.world.gather([[at, len(rows), list(rows.shape[1:]), str(rows.dtype)] for at, rows in self._parts])
        if not self.world.is_main:
            for _, rows in self._parts:
                dist.send(rows.contiguous(), 0, group=self.world.control)
            return None
        for rank in range(1, self.world.size):
            for first, count, shape, dtype in heads[rank]:
                rows = self._place(shape, getattr(torch, dtype.removeprefix("torch.")))
                dist.recv(rows[first : first + count], rank, group=self.world.control)
        return self._all
