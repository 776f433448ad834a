"""Power-function averages and their reconstruction, against integrals and against averages tracked directly."""

import math
from functools import cache

import numpy as np
import pytest

from ldit.training.posthoc import Average, combination, gamma_of, power_decay, residual, sigma_rel_of

UPDATES = 4000
WIDTHS = (0.05, 0.10)
OTHERS = (0.03, 0.04, 0.07, 0.15, 0.20)


def every(spacing: int) -> list[Average]:
    return [(end, width) for end in range(spacing, UPDATES + 1, spacing) for width in WIDTHS]


@cache
def recursion(average: Average) -> np.ndarray:
    """The weight of each of UPDATES updates in an average, by running `power_decay` and nothing else."""
    end, width = average
    betas = np.array([power_decay(gamma_of(width), n) for n in range(1, end + 1)])
    later = np.append(np.cumprod(betas[::-1])[::-1][1:], 1.0)
    return np.append((1 - betas) * later, np.zeros(UPDATES - end))


def fit(stored: list[Average], target: Average) -> tuple[np.ndarray, float]:
    """The error of the reconstruction as a weight of each update, and the residual."""
    coefficients = combination(stored, target)
    made = sum(c * recursion(average) for c, average in zip(coefficients, stored, strict=True))
    return recursion(target) - made, residual(stored, target, coefficients)


# ---------------------------------------------------------------- widths and decays


def test_published_widths() -> None:
    """EDM2: sigma_rel 0.05 and 0.10 are gamma 16.97 and 6.94; the plain mean has sqrt(1/12)."""
    assert gamma_of(0.05) == pytest.approx(16.97, abs=5e-3)
    assert gamma_of(0.10) == pytest.approx(6.94, abs=5e-3)
    assert sigma_rel_of(0.0) == pytest.approx(math.sqrt(1 / 12), rel=1e-15)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 6.94, 16.97, 300.0])
def test_the_width_is_the_deviation_of_the_profile(gamma: float) -> None:
    """Moments of (gamma+1)·t^gamma on [0, 1], by the midpoint rule (its error is 1e-8 of them at most)."""
    t = (np.arange(200_000) + 0.5) / 200_000
    p = (gamma + 1) * t**gamma / 200_000
    mean = (p * t).sum()
    assert sigma_rel_of(gamma) == pytest.approx(math.sqrt((p * (t - mean) ** 2).sum()), rel=1e-6)


@pytest.mark.parametrize("width", [1e-6, 0.001, 0.03, 0.05, 0.1, 0.2, 0.28, 0.2886])
def test_gamma_is_found_to_rounding(width: float) -> None:
    """sigma_rel itself rounds to a few 2^-53, and bisection ends at neighbours: so the width comes back that well."""
    assert sigma_rel_of(gamma_of(width)) == pytest.approx(width, rel=1e-15)


@pytest.mark.parametrize("width", [0.0, -0.1, 0.2887, 1.0, math.nan, math.inf])
def test_widths_that_no_profile_has(width: float) -> None:
    with pytest.raises(ValueError, match="relative width"):
        gamma_of(width)


def test_arguments_out_of_range() -> None:
    for wrong in (lambda: sigma_rel_of(-0.1), lambda: power_decay(7.0, 0), lambda: combination([], (1, 0.1))):
        with pytest.raises(ValueError, match=r"gamma|updates|stored"):
            wrong()
    with pytest.raises(ValueError, match="at least one update"):
        combination([(0, 0.1)], (10, 0.1))


def test_decays_give_the_profile() -> None:
    """Tracked weights are the profile's integrals over single updates; the first update takes everything."""
    assert power_decay(7.0, 1) == 0.0
    for width in (0.03, 0.2):
        weights, gamma = recursion((UPDATES, width)), gamma_of(width)
        t = np.arange(UPDATES + 1) / UPDATES
        assert np.abs(weights - np.diff(t ** (gamma + 1))).max() < 1e-14
        middle = (t[1:] + t[:-1]) / 2
        deviation = math.sqrt((weights * (middle - weights @ middle) ** 2).sum())
        assert deviation == pytest.approx(width, rel=1e-5)  # an update's own width, 1/4000, is missing


# ---------------------------------------------------------------- reconstruction


@pytest.mark.parametrize("spacing", [500, 250])
def test_a_random_walk_is_reconstructed_as_predicted(spacing: int) -> None:
    """Averages tracked along a walk, combined, against the average tracked directly at other widths.

    The error is linear in the walk's independent steps: step m moves all later weights, so it enters with the sum of
    the error's weights from m on, D_m, and the rms error is the root of the sum of D². Over 400 walks its estimate
    deviates by 1/sqrt(800) = 3.5 %; 18 % is five deviations. The walks start at 1000: what stands still must stay.
    """
    rng = np.random.default_rng(0)
    stored = every(spacing)
    gammas = {width: gamma_of(width) for width in (*WIDTHS, *OTHERS)}
    weights = np.full(400, 1000.0)
    averages = {width: np.zeros(400) for width in gammas}
    snapshots = []
    for n in range(1, UPDATES + 1):
        weights = weights + rng.standard_normal(400)
        for width, gamma in gammas.items():
            beta = power_decay(gamma, n)
            averages[width] = beta * averages[width] + (1 - beta) * weights
        if n % spacing == 0:
            snapshots += [averages[width] for width in WIDTHS]
    for width in OTHERS:
        error, _ = fit(stored, (UPDATES, width))
        predicted = math.sqrt((np.cumsum(error[::-1]) ** 2).sum())
        made = np.array(combination(stored, (UPDATES, width))) @ np.array(snapshots)
        measured = math.sqrt(((made - averages[width]) ** 2).mean())
        assert measured == pytest.approx(predicted, rel=0.18)
        nearest = min(math.sqrt(((averages[own] - averages[width]) ** 2).mean()) for own in WIDTHS)
        assert measured < nearest / 5


def test_denser_snapshots_make_smaller_errors() -> None:
    """Between two snapshots the combination has two free powers of t, so it follows the target to second order, as
    interpolation by straight lines: half the spacing, a quarter of the residual (less while the spacing is not small
    beside the width). A walk feels the integral of the error, of third order: an eighth. One width: first order, a
    half."""
    for width in (0.07, 0.15):
        (coarse, wide), (fine, narrow) = fit(every(200), (UPDATES, width)), fit(every(100), (UPDATES, width))
        assert 3.6 < wide / narrow < 4.1
        walks = [math.sqrt((np.cumsum(error[::-1]) ** 2).sum()) for error in (coarse, fine)]
        assert 7 < walks[0] / walks[1] < 8.2
        single = [fit(every(spacing)[::2], (UPDATES, width))[1] for spacing in (200, 100)]
        assert 1.7 < single[0] / single[1] < 2.1


@pytest.mark.parametrize("spacing", [1000, 250])
@pytest.mark.parametrize("width", [0.03, 0.07, 0.25])
def test_the_residual_is_that_of_the_tracked_updates(spacing: int, width: float) -> None:
    """Continuous profiles stand for the discrete ones: residuals agree to (gamma·1/4000)², under 1e-3 of them."""
    error, said = fit(every(spacing), (UPDATES, width))
    assert said == pytest.approx(np.linalg.norm(error) / np.linalg.norm(recursion((UPDATES, width))), rel=1e-3)


@pytest.mark.parametrize("spacing", [4000, 1000, 500, 40])
@pytest.mark.parametrize("width", [0.005, 0.03, 0.07, 0.28])
def test_coefficients_sum_to_one(spacing: int, width: float) -> None:
    """Also where the fit is poor, and where it takes large coefficients: to rounding of the sum."""
    coefficients = combination(every(spacing), (UPDATES, width))
    assert abs(sum(coefficients) - 1) < 1e-15 * len(coefficients) * max(1, sum(map(abs, coefficients)))


def test_a_stored_average_is_itself() -> None:
    stored = every(500)
    for index in (6, 14, 15):
        coefficients = combination(stored, stored[index])
        assert coefficients == pytest.approx([float(i == index) for i in range(len(stored))], abs=1e-9)
        assert residual(stored, stored[index], coefficients) < 1e-7


def test_one_average_is_all_there_is() -> None:
    """A single average is taken whole, and the residual says how wrong that is: against the midpoint rule."""
    stored, target = [(UPDATES, 0.05)], (UPDATES, 0.2)
    assert combination(stored, target) == [pytest.approx(1.0)]
    t = (np.arange(100_000) + 0.5) / 100_000
    p, q = ((g + 1) * t**g for g in (gamma_of(0.05), gamma_of(0.2)))
    assert residual(stored, target, [1.0]) == pytest.approx(np.linalg.norm(p - q) / np.linalg.norm(q), rel=1e-6)


def test_equal_and_neighbouring_snapshots_do_no_harm() -> None:
    """The Gram matrix is singular to rounding: twins share a coefficient, none is large, and the fit is as without.
    (Eigenvectors are known to rounding / cut-off, 2e-16 / 1e-12.)"""
    plain = every(250)
    doubled = [*plain, *plain, (3999, 0.05), (3999, 0.10)]
    coefficients = combination(doubled, (UPDATES, 0.07))
    n = len(plain)
    assert coefficients[:n] == pytest.approx(coefficients[n : 2 * n], abs=1e-3)
    assert sum(map(abs, coefficients)) < 10
    alone = residual(plain, (UPDATES, 0.07), combination(plain, (UPDATES, 0.07)))
    assert residual(doubled, (UPDATES, 0.07), coefficients) <= alone * (1 + 1e-6)


def test_long_runs() -> None:
    """T^gamma alone would overflow: 10^9 updates, gamma 1000."""
    stored = [(10**9, 0.001), (10**9, 0.05), (5 * 10**8, 0.001)]
    coefficients = combination(stored, (10**9, 0.01))
    assert np.isfinite(coefficients).all() and abs(sum(coefficients) - 1) < 1e-9


def test_widths_out_of_reach_are_told() -> None:
    """Four snapshots cannot make a width of 0.02 or 0.25; the residual says so, and 0.07 is within reach."""
    for width, low, high in ((0.02, 0.2, 1.0), (0.25, 0.2, 1.0), (0.07, 0.0, 0.05)):
        assert low <= fit(every(1000), (UPDATES, width))[1] < high
