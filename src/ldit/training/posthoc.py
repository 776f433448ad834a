"""Power-function averages of the weights: decay, and coefficients that combine stored averages into others.

Source: Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3 and appendix
C. A power-function average after T updates weights the parameters of time t in [0, T] by the profile
p(t) = (gamma + 1) t^gamma / T^(gamma + 1). Its relative width sigma_rel is the standard deviation of p divided by T.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

WIDEST = math.sqrt(1 / 12)  # sigma_rel of gamma = 0, the plain mean

_CUT = 1e-12

Average = tuple[int, float]
"""(updates, sigma_rel) of an average."""


def sigma_rel_of(gamma: float) -> float:
    """Relative width of the profile t^gamma; it falls as gamma grows. ValueError for gamma < 0, where the profile would
    weight early parameters most."""
    if not gamma >= 0:
        raise ValueError(f"gamma must not be negative, got {gamma}")
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def gamma_of(sigma_rel: float) -> float:
    """The exponent of a relative width: the inverse of `sigma_rel_of`, by bisection to the last bit of a float64.

    ValueError outside (0, 0.2887).
    """
    if not 0 < sigma_rel < WIDEST:
        raise ValueError(f"a relative width must be in (0, {WIDEST:.4f}), got {sigma_rel}")
    low, high = 0.0, 1 / sigma_rel  # sigma_rel < 1 / (gamma + 2), so gamma < 1 / sigma_rel
    while low < (middle := (low + high) / 2) < high:
        if sigma_rel_of(middle) > sigma_rel:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def power_decay(gamma: float, n: int) -> float:
    """beta of update n = 1, 2, …: average = beta·average + (1 - beta)·weights, beta = (1 - 1/n)^(gamma + 1).

    beta is 0 at the first update, so the average starts as the weights. The weight of update n in the average of T
    updates telescopes to (n^(gamma+1) - (n-1)^(gamma+1)) / T^(gamma+1): exactly the profile's integral over [n - 1, n].
    ValueError for n < 1.
    """
    if n < 1:
        raise ValueError(f"updates are counted from 1, got {n}")
    return math.exp((gamma + 1) * math.log1p(-1 / n)) if n > 1 else 0.0


def combination(stored: Sequence[Average], target: Average) -> list[float]:
    """Coefficients of the stored averages for the combination nearest to the target: least squares between profiles
    (appendix C.3), over coefficients that sum to 1.

    The sum is fixed so that parameters which do not change are reproduced. Plain least squares shrinks every parameter
    when there are few snapshots (by 2 % with eight of widths 0.05 and 0.10 and target 0.20, by 9 % with four). The
    profiles are the continuous ones, which have closed forms. Those of discrete updates (`power_decay`) would lower the
    error by only 2 % of it after 64 updates, 0.2 % after 128.

    ValueError when nothing is stored, or for impossible updates and widths.
    """
    if not stored:
        raise ValueError("there are no stored averages")
    # The normal equations. Profiles are scaled to norm 1: norms fall as 1 / sqrt(updates), and the cut-off below must
    # treat short averages the same.
    gram, target_products = _products(stored, stored), _products(stored, [target])[:, 0]  # (S, S), (S,)
    scale = 1 / np.sqrt(np.diag(gram))
    gram, target_products = gram * np.outer(scale, scale), target_products * scale
    # One solution whose sum is 1, and the projection onto the directions that keep the sum. Coefficients are
    # scale·solution.
    start = scale / (scale @ scale)
    free = np.eye(len(stored)) - np.outer(scale, scale) / (scale @ scale)
    values, vectors = np.linalg.eigh(free @ gram @ free)
    # Averages of the same update, or of adjacent ones, have nearly the same profile. The direction of their difference
    # has an eigenvalue of the size of rounding errors; dividing by it would give huge coefficients of opposite sign to
    # parameters that are stored in fp32. Such directions are dropped.
    kept = values > _CUT * np.trace(gram)
    # Project again: an eigenvector of a small eigenvalue contains a little of the direction that changes the sum, in
    # which the gradient is large.
    vectors = free @ vectors[:, kept]
    coefficients = (start + vectors @ (vectors.T @ (target_products - gram @ start) / values[kept])) * scale
    return [float(value) for value in coefficients]


def residual(stored: Sequence[Average], target: Average, coefficients: Sequence[float]) -> float:
    """Relative distance of the combination's profile from the target's: norm of the difference / norm of the target.
    0 = the target itself; values below about 1e-7 are rounding."""
    c = np.asarray(coefficients, dtype=np.float64)
    own = float(_products([target], [target])[0, 0])
    error = own - 2 * float(c @ _products(stored, [target])[:, 0]) + float(c @ _products(stored, stored) @ c)
    return math.sqrt(max(error, 0.0) / own)


def _products(first: Sequence[Average], second: Sequence[Average]) -> NDArray[np.float64]:
    """Inner products over time of the profiles of `first` (rows) and `second` (columns).

    With a the average that ends first and b the other, the integral of p_a·p_b over [0, T_a] is
    (gamma_a+1)(gamma_b+1) / (gamma_a+gamma_b+1) · (T_a/T_b)^gamma_b / T_b. (Ratios, because powers of T overflow.)
    """
    (ends_a, gammas_a), (ends_b, gammas_b) = _columns(first), _columns(second)
    a, b, g, h = ends_a[:, None], ends_b[None, :], gammas_a[:, None], gammas_b[None, :]
    late = np.maximum(a, b)
    product: NDArray[np.float64] = (g + 1) * (h + 1) / (g + h + 1) / late
    product *= (np.minimum(a, b) / late) ** np.where(a <= b, h, g)
    return product


def _columns(averages: Sequence[Average]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Updates (N,) and exponents gamma (N,), float64."""
    if any(updates < 1 for updates, _ in averages):
        raise ValueError("an average has at least one update")
    exponents = {width: gamma_of(width) for _, width in averages}
    ends = np.array([updates for updates, _ in averages], dtype=np.float64)
    return ends, np.array([exponents[width] for _, width in averages], dtype=np.float64)
