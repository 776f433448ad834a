"""Mean and covariance of rows that come in batches and from several processes, in float64.

Two groups of rows are joined by Chan, Golub & LeVeque's update (1983): with counts n and m and the offset
d = mean_m - mean_n the centred sums of products add up to C_n + C_m + n·m/(n+m)·d·d^T. Nothing is ever the difference
of two large sums, so batches and processes change rounding alone: some 1e-15 of the largest entry.
"""

import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from ldit.errors import EvaluationError
from ldit.eval.metrics.rows import check_finite, double
from ldit.parallel.world import World

_ROWS = 4096  # that are held in float64 at once


class Moments:
    """Count, mean and centred sum of products of rows `width` wide, in float64.

    Memory is width² numbers, whatever the count: 32 MiB for 2,048. They lie on the device of the first rows, where the
    products are computed too.
    """

    def __init__(self, width: int) -> None:
        self.width, self.count = width, 0
        self._mean = torch.zeros(width, dtype=torch.float64)
        self._products = torch.zeros(width, width, dtype=torch.float64)

    @property
    def mean(self) -> Tensor:
        """(D,) float64 on the CPU; zeros before the first row."""
        return self._mean.cpu().clone()

    @property
    def covariance(self) -> Tensor:
        """(D, D) float64 on the CPU, over N - 1; EvaluationError for fewer than two rows."""
        if self.count < 2:
            raise EvaluationError(f"a covariance needs at least 2 images, got {self.count}")
        half = self._products.cpu() / (2.0 * (self.count - 1))
        return half + half.T

    def add(self, rows: Tensor, first: int | None = None) -> None:
        """Rows (B, D) of any float dtype, on any device. EvaluationError names a row that is not finite, by its number
        among all that were added, or counted from `first`; nothing of the batch is taken then."""
        if rows.ndim != 2 or rows.shape[1] != self.width:
            raise ValueError(f"expected rows {self.width} wide, got the shape {tuple(rows.shape)}")
        check_finite(rows, "features", self.count if first is None else first)
        for part in rows.split(_ROWS):
            self._add(double(part))

    def _add(self, rows: Tensor) -> None:
        """One product a batch: the offset of its mean goes along as one more row."""
        if not len(rows):
            return
        self._go_to(rows.device)
        rows = rows.to(self._mean.device)
        mean = rows.mean(dim=0)
        weight = self._join(len(rows))
        offset = mean - self._mean
        factors = torch.cat([rows - mean, offset[None] * math.sqrt(weight)])
        self._products.addmm_(factors.T, factors)
        self._mean += offset * (len(rows) / self.count)

    def merge(self, other: "Moments") -> None:
        """Take in what `other` has seen; `other` stays as it is."""
        if other.width != self.width:
            raise ValueError(f"moments of rows {self.width} and {other.width} wide cannot be merged")
        if not other.count:
            return
        self._go_to(other._mean.device)
        weight = self._join(other.count)
        offset = other._mean.to(self._mean.device) - self._mean
        self._products += other._products.to(self._products.device)
        self._products += torch.outer(offset, offset) * weight
        self._mean += offset * (other.count / self.count)

    def merged(self, world: World) -> "Moments":
        """The moments of all processes' rows, joined in the order of their ranks: the same on every process. Each sends
        its own once, over the CPU; two of them are held beside the result at a time."""
        whole = Moments(self.width)
        for part in self._of_all(world):
            whole.merge(part)
        return whole

    def _of_all(self, world: World) -> Iterator["Moments"]:
        if world.size == 1:
            yield self
            return
        counts = world.gather(self.count)
        for rank, count in enumerate(counts):
            part = Moments(self.width)
            part.count = count
            if rank == world.rank:
                part._mean.copy_(self._mean)
                part._products.copy_(self._products)
            if count:
                dist.broadcast(part._mean, src=rank, group=world.control)
                dist.broadcast(part._products, src=rank, group=world.control)
            yield part

    def _join(self, rows: int) -> float:
        """Count so many more rows; the weight n·m/(n+m) of the offset between the two groups."""
        before = self.count
        self.count += rows
        return before * rows / self.count

    def _go_to(self, device: torch.device) -> None:
        """The first rows decide where the sums lie; later ones come there."""
        if not self.count:
            self._mean, self._products = self._mean.to(device), self._products.to(device)
