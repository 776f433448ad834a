"""The kernel distance (KID, Bińkowski et al. 2018): an unbiased estimate of the squared MMD of features.

The kernel is (x·y/D + 1)³. For m samples and m references the estimate is

    mean of k(x_i, x_j) over i ≠ j + mean of k(y_i, y_j) over i ≠ j - 2·mean of k(x_i, y_j)

(Gretton et al. 2012, eq. 3), averaged over subsets drawn without replacement. It is unbiased, so it may be negative.

With the mean c of the references, x·y = (x-c)·(y-c) + (x·c - c·c/2) + (y·c - c·c/2). The first product is of float32,
which is twice as fast as float64; all else is of float64. The product of centred rows is small for most pairs, and its
rounding errors differ from pair to pair. So the estimate is within 1e-9 of one in float64 for features of an extractor,
where products of float32 rows as they are would be off by some 1e-7.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ldit.errors import EvaluationError
from ldit.eval.metrics.rows import double, two_sets
from ldit.precision import unrounded
from ldit.rng import generator

SUBSETS, SUBSET_SIZE = 100, 1000
_BAND = 200  # rows of a kernel that are computed together
_SEED, _STREAM = 0, "kid"


class KernelDistance(NamedTuple):
    """Mean and standard deviation (divided by the number of subsets) of the estimates from `subsets` pairs of subsets
    of `subset_size` rows.

    Subsets share rows, so the deviation is that of subsets of one set, not that between sets. Two sets of exactly
    `subset_size` rows have a single subset and the deviation 0.
    """

    mean: float
    deviation: float
    subset_size: int
    subsets: int


def kernel_distance(
    samples: Tensor, references: Tensor, subsets: int = SUBSETS, subset_size: int = SUBSET_SIZE
) -> KernelDistance:
    """The kernel distance of features (N, D) and (M, D), on the samples' device.

    Subsets are drawn with a fixed seed: rows in the same order give the same number. They have min(N, M, subset_size)
    rows; if that is both N and M, there is one subset. EvaluationError when it is less than 2, a row is not finite, or
    the widths differ, or products of features are beyond float32. Work: 4.5·subset_size²·D for each subset, seconds for
    100 subsets of 2,048 features on a CPU. Memory besides the features: their centred copy, two subsets, and a band of
    their kernel.
    """
    samples, references = two_sets(samples, references)
    size = min(len(samples), len(references), subset_size)
    if size < 2:
        raise EvaluationError(
            f"the kernel distance needs at least 2 images on each side, got {len(samples)} and {len(references)}"
        )
    if size == len(samples) == len(references):
        subsets = 1
    # Centre both sets once; the buffers of the subsets serve all of them.
    centre = references.mean(dim=0, dtype=torch.float64).float()
    centred, other_centred = _centred(samples, centre), _centred(references, centre)
    x, y = (_Rows.empty(rows.centred, size) for rows in (centred, other_centred))
    estimates = torch.empty(subsets, dtype=torch.float64)
    with unrounded():
        for number in range(subsets):
            centred.take(_draw(centred, size, number, "samples"), x)
            other_centred.take(_draw(other_centred, size, number, "references"), y)
            own = _own_sum(x) + _own_sum(y)
            estimates[number] = own / (size * (size - 1)) - 2.0 * _sum_between(x, y) / size**2
    if not torch.isfinite(estimates).all():
        raise EvaluationError("the kernel distance is not finite: the features are too large")
    scale = float(estimates.abs().max()) or 1.0  # squares of very small or large numbers would under- or overflow
    return KernelDistance(float(estimates.mean()), scale * float((estimates / scale).std(correction=0)), size, subsets)


class _Rows(NamedTuple):
    centred: Tensor
    """(B, D) float32: rows minus the centre c."""
    offsets: Tensor
    """(B,) float64: (x·c - c·c/2)/D + 1/2, so that x·y/D + 1 is the product of the centred rows over D plus both."""

    @staticmethod
    def empty(like: Tensor, size: int) -> "_Rows":
        return _Rows(like.new_empty(size, like.shape[1]), like.new_empty(size, dtype=torch.float64))

    def band(self, first: int, last: int) -> "_Rows":
        return _Rows(self.centred[first:last], self.offsets[first:last])

    def take(self, chosen: Tensor, into: "_Rows") -> None:
        torch.index_select(self.centred, 0, chosen, out=into.centred)
        torch.index_select(self.offsets, 0, chosen, out=into.offsets)


def _centred(rows: Tensor, centre: Tensor) -> _Rows:
    """Rows (N, D) of any float dtype around the centre (D,)."""
    exact = double(centre)
    products = torch.cat([double(part) @ exact for part in rows.split(4096)])  # few rows in float64 at a time
    return _Rows((rows - centre).float(), (products - exact @ exact / 2.0) / rows.shape[1] + 0.5)


def _draw(rows: _Rows, size: int, number: int, side: str) -> Tensor:
    """(size,): the numbers of the rows of a subset."""
    chosen = torch.randperm(len(rows.offsets), generator=generator(_SEED, _STREAM, number, side))[:size]
    return chosen.to(rows.offsets.device)


def _kernel(x: _Rows, y: _Rows) -> Tensor:
    """(X, Y) float64."""
    inner = x.offsets[:, None] + y.offsets
    inner.add_(x.centred @ y.centred.T, alpha=1.0 / x.centred.shape[1])
    return inner.square().mul_(inner)


def _bands(rows: _Rows) -> Iterator[tuple[int, int]]:
    for first in range(0, len(rows.offsets), _BAND):
        yield first, min(first + _BAND, len(rows.offsets))


def _sum_between(x: _Rows, y: _Rows) -> Tensor:
    """The sum of the kernel over all pairs of a row of x and one of y."""
    return torch.stack([_kernel(x.band(*band), y).sum() for band in _bands(x)]).sum()


def _own_sum(x: _Rows) -> Tensor:
    """The sum of the kernel over all pairs of different rows, by the pairs up to the diagonal."""
    total = x.offsets.new_zeros(())
    for first, last in _bands(x):
        kernel = _kernel(x.band(first, last), x.band(0, last))
        square = kernel[:, first:]
        total += 2.0 * kernel[:, :first].sum() + square.sum() - square.diagonal().sum()
    return total
