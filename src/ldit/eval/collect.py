"""What is kept of pictures that stream through an extractor: moments always, rows where they are needed."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ldit.errors import EvaluationError
from ldit.eval.extractor import Features
from ldit.eval.moments import Moments
from ldit.eval.scores import InceptionScore
from ldit.parallel.world import World


@dataclass(frozen=True)
class Collected:
    """A whole set, seen by all processes. `rows` (N, D) and `predicted` (N,), in the order of the pictures, are on the
    first process alone, and None where they were not kept."""

    pool: Moments
    spatial: Moments | None
    scores: InceptionScore | None
    rows: Tensor | None
    predicted: Tensor | None

    @property
    def count(self) -> int:
        return self.pool.count


class Collector:
    """Features of the pictures of one set, or of this process's share of them, batch by batch in any order.

    Memory: moments take 8·D² bytes whatever the number of pictures; with `keep_rows` 4·D bytes a picture come on top,
    on the host, which precision, recall, KID and intervals need.
    """

    def __init__(self, keep_rows: bool) -> None:
        self.keep_rows = keep_rows
        self.pool: Moments | None = None
        self.spatial: Moments | None = None
        self.scores: InceptionScore | None = None
        self._rows: list[tuple[int, Tensor]] = []
        self._predicted: list[tuple[int, Tensor]] = []

    def add(self, first: int, features: Features) -> None:
        """Features of pictures `first` onwards. EvaluationError names the first that is not finite."""
        if self.pool is None:
            self.pool = Moments(features.pool.shape[1])
            self.spatial = None if features.spatial is None else Moments(features.spatial.shape[1])
            self.scores = None if features.logits is None else InceptionScore()
        self.pool.add(features.pool, first)
        if self.spatial is not None and features.spatial is not None:
            self.spatial.add(features.spatial, first)
        if self.scores is not None and features.logits is not None:
            self.scores.add(first, features.logits)
            self._predicted.append((first, features.logits.argmax(1).cpu()))
        if self.keep_rows:
            self._rows.append((first, features.pool.float().cpu()))

    def merged(self, world: World) -> Collected:
        """The features of all processes; all call it together. EvaluationError where none saw a picture."""
        if all(width is None for width in world.gather(None if self.pool is None else self.pool.width)):
            raise EvaluationError("there are no pictures")
        shapes = next(filter(None, world.gather(self._shapes())))
        pool = (self.pool or Moments(shapes[0])).merged(world)
        spatial = (self.spatial or Moments(shapes[1])).merged(world) if shapes[1] else None
        scores = (self.scores or InceptionScore()).merged(world) if shapes[2] else None
        rows = in_order(self._rows, world) if self.keep_rows else None
        predicted = in_order(self._predicted, world) if shapes[2] else None
        return Collected(pool, spatial, scores, rows, predicted)

    def _shapes(self) -> list[int] | None:
        if self.pool is None:
            return None
        return [self.pool.width, 0 if self.spatial is None else self.spatial.width, int(self.scores is not None)]


def in_order(parts: Sequence[tuple[int, Tensor]], world: World) -> Tensor | None:
    """Rows that lie on several processes, each part with the number of its first row: on the first process all of them
    in order, elsewhere None. All call it together."""
    own = sorted(parts, key=lambda part: part[0])
    heads = world.gather([[first, len(rows), list(rows.shape[1:]), str(rows.dtype)] for first, rows in own])
    if not world.first:
        for _, rows in own:
            dist.send(rows.contiguous(), 0, group=world.control)
        return None
    found = list(own)
    for rank in range(1, world.size):
        for first, count, shape, dtype in heads[rank]:
            rows = torch.empty(count, *shape, dtype=getattr(torch, dtype.removeprefix("torch.")))
            dist.recv(rows, rank, group=world.control)
            found.append((first, rows))
    found.sort(key=lambda part: part[0])
    return torch.cat([rows for _, rows in found])
