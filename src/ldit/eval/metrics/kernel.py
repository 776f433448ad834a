"""The kernel distance (KID, Bińkowski et al. 2018): an unbiased estimate of the squared MMD of features.

The kernel is (x·y/D + 1)³. For m samples and m references the estimate is

    mean of k(x_i, x_j) over i ≠ j + mean of k(y_i, y_j) over i ≠ j - 2·mean of k(x_i, y_j)

(Gretton et al. 2012, eq. 3), averaged over subsets drawn without replacement. It is unbiased, so it may be negative.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ldit.errors import EvaluationError
from ldit.eval.metrics.rows import double, two_sets
from ldit.rng import generator

SUBSETS, SUBSET_SIZE = 100, 1000
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
    """The kernel distance of features (N, D) and (M, D); kernels are computed in float64 on the samples' device.

    Subsets are drawn with a fixed seed: rows in the same order give the same number. They have min(N, M, subset_size)
    rows; if that is both N and M, there is one subset. EvaluationError when it is less than 2, a row is not finite, or
    the widths differ. Work: 6·subset_size²·D for each subset, minutes for 100 subsets of 2,048 features on a CPU.
    Memory besides the features: two subsets and one kernel of subset_size², in float64.
    """
    samples, references = two_sets(samples, references)
    size = min(len(samples), len(references), subset_size)
    if size < 2:
        raise EvaluationError(
            f"the kernel distance needs at least 2 images on each side, got {len(samples)} and {len(references)}"
        )
    if size == len(samples) == len(references):
        subsets = 1
    estimates = torch.empty(subsets, dtype=torch.float64)
    for number in range(subsets):
        x = double(_subset(samples, size, number, "samples"))
        y = double(_subset(references, size, number, "references"))
        own = _kernel_sum(x) + _kernel_sum(y)
        estimates[number] = own / (size * (size - 1)) - 2.0 * _kernel(x, y).sum() / size**2
    if not torch.isfinite(estimates).all():
        raise EvaluationError("the kernel distance is not finite: the features are too large")
    scale = float(estimates.abs().max()) or 1.0  # squares of very small or large numbers would under- or overflow
    return KernelDistance(float(estimates.mean()), scale * float((estimates / scale).std(correction=0)), size, subsets)


def _subset(rows: Tensor, size: int, number: int, side: str) -> Tensor:
    chosen = torch.randperm(len(rows), generator=generator(_SEED, _STREAM, number, side))[:size]
    return rows[chosen.to(rows.device)]


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    inner = (x @ y.T).div_(x.shape[1]).add_(1.0)
    return inner.square().mul_(inner)


def _kernel_sum(x: Tensor) -> Tensor:
    """The sum of the kernel over all pairs of different rows."""
    kernel = _kernel(x, x)
    return kernel.sum() - kernel.diagonal().sum()
