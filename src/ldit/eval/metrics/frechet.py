"""The Fréchet distance of two Gaussians (Dowson & Landau 1982), squared as Heusel et al. (2017) report it.

    |mean1 - mean2|² + tr S1 + tr S2 - 2·tr (S1·S2)^½

The last trace is the sum of the singular values of S1^½·S2^½. With S = U·L·U^T these are the singular values of
L1^½·U1^T·U2·L2^½: two symmetric eigenproblems and a singular value decomposition, all backward stable.

A covariance of fewer images than features is singular. Rounding makes its zero eigenvalues about 1e-16 of the largest;
their square roots are 1e-8, two thousand times: 1e-5 of the distance, different for every batch size. So eigenvalues
below max(D, 64)·2^-52 of the largest are set to zero, as for a numerical rank. Computing roots of the eigenvalues of
S1·S2, or of S1^½·S2·S1^½, would take roots of rounding errors a second time; singular values avoid that. Batch size and
number of processes then change the distance by about 1e-13 of the traces.
"""

import math

import torch
from torch import Tensor

from ldit.errors import EvaluationError

_LEAST_RANK = 64  # for the cut-off: rounding does not shrink further in smaller eigenproblems
_NEGATIVE = 1e-4  # relative to the largest eigenvalue: more than the rounding of a covariance in single precision


def frechet_distance(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> float:
    """The distance for means (D,) and covariances (D, D), computed in float64 on the CPU; never negative.

    EvaluationError when the widths differ, an input is not finite or not a covariance, or the distance overflows.
    """
    # Check the inputs.
    means = [_input(value, "mean", 1) for value in (mean1, mean2)]
    covariances = [_input(value, "covariance", 2) for value in (covariance1, covariance2)]
    widths = [len(value) for value in (*means, *covariances)]
    if len(set(widths)) > 1:
        raise EvaluationError(
            f"statistics of {widths[0]} and {widths[1]} features, with covariances of {widths[2]} and {widths[3]}, "
            "have no distance"
        )
    # The three terms.
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
    """The value in float64 on the CPU, checked."""
    value = value.detach().cpu().to(torch.float64)
    if value.ndim != axes or len(set(value.shape)) != 1 or not value.numel():
        raise EvaluationError(f"a {what} of the shape {tuple(value.shape)} has no Fréchet distance")
    if not torch.isfinite(value).all():
        raise EvaluationError(f"a {what} of the Fréchet distance is not finite")
    return value


def _root(covariance: Tensor) -> Tensor:
    """U·L^½ (D, rank), without the columns of eigenvalues that are zero up to rounding."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2.0)
    largest = float(values.abs().max())
    if float(values[0]) < -_NEGATIVE * largest:
        raise EvaluationError(f"not a covariance: it has the eigenvalue {float(values[0]):.3g}")
    cut = max(len(values), _LEAST_RANK) * torch.finfo(torch.float64).eps * largest
    kept = values > cut
    return vectors[:, kept] * values[kept].sqrt()
