"""Mean and covariance of rows that come in batches and from several ranks, in float64.

Two groups of rows are merged by the update of Chan, Golub & LeVeque (1983): with counts n and m and the offset
d = mean_m - mean_n, the merged sum of centred products is C_n + C_m + n·m/(n+m)·d·d^T. No difference of large sums
occurs, so batches and ranks change only rounding: about 1e-15 of the largest entry.

The sum is symmetric, so only its lower triangle is computed, in bands of rows up to the diagonal: 5/8 of the products
of a full matrix at 2,048 features. What is above the diagonal, outside the squares on it, is never read.
"""

import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from ldit.errors import EvaluationError
from ldit.eval.metrics.rows import check_finite, float64_home
from ldit.parallel.world import World

_ROWS = 1024  # converted to float64 at a time
_BAND = 512  # rows of the sum of products that are computed together


class Moments:
    """Count, mean and sum of centred products of rows of length `width`, in float64.

    Memory: width² numbers, 32 MiB for 2,048, on the device of the first rows.
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
        covariance = self._products.cpu() / (self.count - 1)
        for band in self._bands():
            square = covariance[band, band]
            square.copy_((square + square.T) / 2.0)  # products of two columns may round otherwise in the other order
            covariance[: band.start, band] = covariance[band, : band.start].T
        return covariance

    def add(self, rows: Tensor, first: int | None = None) -> None:
        """Add rows (B, D) of any float dtype, on any device. If one is not finite, EvaluationError gives its number,
        counted from `first` or from all rows added, and nothing of the batch is added."""
        if rows.ndim != 2 or rows.shape[1] != self.width:
            raise ValueError(f"expected rows {self.width} wide, got the shape {tuple(rows.shape)}")
        check_finite(rows, "features", self.count if first is None else first)
        if not len(rows):
            return
        self._go_to(float64_home(rows.device))
        # One buffer for all parts: in each, the offset of the means is a row after the centred rows.
        factors = self._mean.new_empty(min(len(rows), _ROWS) + 1, self.width)
        for part in rows.detach().split(_ROWS):
            self._add(part, factors[: len(part) + 1])

    def _add(self, rows: Tensor, factors: Tensor) -> None:
        """Add rows (B, D) with products of `factors` (B + 1, D), which are overwritten."""
        centred = factors[:-1].copy_(rows.to(factors.device))
        mean = centred.mean(dim=0)
        weight = self._join(len(rows))
        offset = mean - self._mean
        centred -= mean
        factors[-1] = offset * math.sqrt(weight)
        for band in self._bands():
            self._products[band, : band.stop].addmm_(factors[:, band].T, factors[:, : band.stop])
        self._mean += offset * (len(rows) / self.count)

    def _bands(self) -> list[slice]:
        return [slice(first, min(first + _BAND, self.width)) for first in range(0, self.width, _BAND)]

    def merge(self, other: "Moments") -> None:
        """Add the rows of `other`, which is not changed."""
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
        """The moments of all ranks' rows, merged in the order of the ranks, on every rank. Each rank broadcasts its own
        over the CPU, one after the other."""
        total = Moments(self.width)
        for part in self._of_all(world):
            total.merge(part)
        return total

    def _of_all(self, world: World) -> Iterator["Moments"]:
        """The moments of each rank, in order."""
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
        """Count `rows` more rows; returns n·m/(n+m), the weight of the offset between the two groups."""
        before = self.count
        self.count += rows
        return before * rows / self.count

    def _go_to(self, device: torch.device) -> None:
        """Move the sums to the device of the first rows. Later rows are moved to the sums."""
        if not self.count:
            self._mean, self._products = self._mean.to(device), self._products.to(device)
