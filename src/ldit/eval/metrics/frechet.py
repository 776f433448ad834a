"""The Fréchet distance of two Gaussians (Dowson & Landau 1982), squared as Heusel et al. (2017) report it.

    |mean1 - mean2|² + tr S1 + tr S2 - 2·tr (S1·S2)^½

The last trace is the sum of the singular values of S1^½·S2^½. With S = U·L·U^T that is the sum of those of
L1^½·U1^T·U2·L2^½: two symmetric eigenproblems and singular values, each of them backward stable.

A covariance of fewer images than features is singular. Its zero eigenvalues come out as rounding, some 1e-16 of the
largest, and a square root makes 1e-8 of that, two thousand times over: 1e-5 of the distance, and another with every
batch size. So eigenvalues within rounding of zero, max(D, 64)·2^-52 of the largest, are zero, as in a numerical rank.
Roots of the eigenvalues of S1·S2, or of S1^½·S2·S1^½, take the root of rounding in the product a second time; singular
values do not. Batches and processes then move the distance by some 1e-13 of the traces.
"""

import math

import torch
from torch import Tensor

from ldit.errors import EvaluationError

_LEAST_RANK = 64  # for the cut: rounding of small eigenproblems does not shrink with their size
_NEGATIVE = 1e-4  # of the largest eigenvalue: more than the rounding of a covariance computed in single precision


def frechet_distance(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> float:
    """Of means (D,) and covariances (D, D), computed in float64 on the CPU; never negative.

    EvaluationError when the widths differ, an input is not finite or no covariance, or the distance overflows.
    """
    means = [_input(value, "mean", 1) for value in (mean1, mean2)]
    covariances = [_input(value, "covariance", 2) for value in (covariance1, covariance2)]
    widths = [len(value) for value in (*means, *covariances)]
    if len(set(widths)) > 1:
        raise EvaluationError(
            f"statistics of {widths[0]} and {widths[1]} features, with covariances of {widths[2]} and {widths[3]}, "
            "have no distance"
        )
    offset = (means[0] - means[1]).square().sum()
    traces = covariances[0].trace() + covariances[1].trace()
    try:
        product = _root(covariances[0]).T @ _root(covariances[1])
        common = torch.linalg.svdvals(product).sum() if product.numel() else product.sum()
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise EvaluationError(f"the Fréchet distance cannot be computed: {error}") from None
    distance = float(offset + traces - 2.0 * common)
    if not math.isfinite(distance):
        raise EvaluationError(f"the Fréchet distance is {distance}: the statistics are too large")
    return max(distance, 0.0)


def _input(value: Tensor, what: str, axes: int) -> Tensor:
    value = value.detach().cpu().to(torch.float64)
    if value.ndim != axes or len(set(value.shape)) != 1 or not value.numel():
        raise EvaluationError(f"a {what} of the shape {tuple(value.shape)} has no Fréchet distance")
    if not torch.isfinite(value).all():
        raise EvaluationError(f"a {what} of the Fréchet distance is not finite")
    return value


def _root(covariance: Tensor) -> Tensor:
    """(D, rank): U·L^½ without the columns that are rounding."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2.0)
    largest = float(values.abs().max())
    if float(values[0]) < -_NEGATIVE * largest:
        raise EvaluationError(f"not a covariance: it has the eigenvalue {float(values[0]):.3g}")
    cut = max(len(values), _LEAST_RANK) * torch.finfo(torch.float64).eps * largest
    kept = values > cut
    return vectors[:, kept] * values[kept].sqrt()
