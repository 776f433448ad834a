"""Multistep solvers: one evaluation a step; estimates of earlier steps raise the order.

Adams-Bashforth integrates dz/dr = eps - x0 in straight coordinates, z = x/(alpha+sigma), r = sigma/(alpha+sigma). The
exponential integrators DPM-Solver++ and UniPC integrate x_t = sigma_t/sigma_s·x_s + sigma_t·∫ e^l·x0(l) dl over the
half log-SNR l = log(alpha/sigma). A level of pure noise has l = -∞ and is left out of the polynomials. In every loop a
is the level of the state x, b the next one, and d the estimates at a.

A polynomial through earlier estimates says nothing about places far beyond them. So where a step is more than twice as
long as the one before it, the order is lowered (`_within_reach`). Equal steps, as the papers assume, are not affected.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from numpy.polynomial import Polynomial
from torch import Tensor

from ldit.diffusion.process import Level
from ldit.sampling.denoiser import Denoiser
from ldit.sampling.step import Noise, Solver, Step

Known = list[tuple[float, Tensor]]
"""(place, value) of the newest steps, newest first."""
_GROWTH = 2.0  # a step may be this many times as long as the interval to the estimate that it uses
_LOGSNR_GROWTH = (2.0, 1.25)
"""The same for the second and third estimate over the half log-SNR, where data changes within steps of length 1. With
2.0 for the third, third order at 10 steps of the Karras grid has 1.2 to 1.8 times Euler's error on a mixture."""
_ROUNDING = 1.0 + 1e-9  # a step that grows by exactly the allowed ratio is allowed
_LONGEST_BH1 = 1.0  # bh1 stands for 1 - e^-h, and is more than 1.6 times that beyond this step


def adams_bashforth(order: int) -> Solver:
    """The solver of 2nd, 3rd or 4th order (Bashforth & Adams 1883), for steps of any lengths.

    The first steps have few estimates to use, and their low order would limit that of the result. So the states after
    the first step (order 3) or the first two (order 4) are computed again as soon as the next estimate is there, which
    costs no evaluation. That start is of third order, and so is order 4 in the limit of many steps.
    """

    def solve(denoise: Denoiser, x: Tensor, levels: Sequence[Level], noise: Noise) -> Iterator[Step]:
        start = (levels[0].r, x / levels[0].length)
        known: Known = []
        for i, (a, b) in enumerate(pairwise(levels)):
            d = denoise(x, a)
            known = [(a.r, d.eps - d.x0), *known][:order]
            # Correct one of the first states: integrate again from the start, with all slopes up to here.
            if 1 <= i <= order - 2:
                x = a.length * (start[1] + _integral(known, start[0], a.r))
            x = b.length * (x / a.length + _integral(_within_reach(known, b.r), a.r, b.r))
            yield Step(i, x, d.x0)

    return solve


def dpm_2m(denoise: Denoiser, x: Tensor, levels: Sequence[Level], noise: Noise) -> Iterator[Step]:
    """DPM-Solver++(2M) (Lu et al. 2022), second order. The last step, to clean data, returns the estimate of it."""
    known: Known = []
    for i, (a, b) in enumerate(pairwise(levels)):
        d = denoise(x, a)
        known = [(a.half_logsnr, d.x0), *known][:2]
        if b.sigma > 0:
            h = b.half_logsnr - a.half_logsnr
            x = (b.sigma / a.sigma) * x - b.alpha * math.expm1(-h) * _to_the_middle(known, b)
        else:
            x = b.alpha * d.x0
        yield Step(i, x, d.x0)


def dpm_3m(denoise: Denoiser, x: Tensor, levels: Sequence[Level], noise: Noise) -> Iterator[Step]:
    """DPM-Solver++(3M) (Lu et al. 2022), with the coefficients of its published code.

    Third order between the first two steps and the step before clean data, which are of lower order.
    """
    known: Known = []
    for i, (a, b) in enumerate(pairwise(levels)):
        d = denoise(x, a)
        known = [(a.half_logsnr, d.x0), *known][: min(3, _left(levels, i))]
        near = _within_reach(known, b.half_logsnr, _LOGSNR_GROWTH)
        h = b.half_logsnr - a.half_logsnr
        if not b.sigma:
            x = b.alpha * d.x0
        elif len(near) < 3:
            x = (b.sigma / a.sigma) * x - b.alpha * math.expm1(-h) * _to_the_middle(near, b)
        else:
            # First and second differences of the estimates, over steps in units of h.
            (l0, m0), (l1, m1), (l2, m2) = near
            r0, r1 = (l0 - l1) / h, (l1 - l2) / h
            newer, older = (m0 - m1) / r0, (m1 - m2) / r1
            second = (newer - older) / (r0 + r1)
            first = newer + r0 * second
            phi1 = math.expm1(-h)
            phi2 = phi1 / h + 1.0
            x = (b.sigma / a.sigma) * x - b.alpha * (phi1 * m0 - phi2 * first + (phi2 / h - 0.5) * second)
        yield Step(i, x, d.x0)


def dpm_2m_sde(denoise: Denoiser, x: Tensor, levels: Sequence[Level], noise: Noise) -> Iterator[Step]:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022): x' = sigma_t/sigma_s·e^-h·x + alpha_t·(1 - e^-2h)·D +
    sigma_t·sqrt(1 - e^-2h)·noise, with D as in `dpm_2m`."""
    known: Known = []
    for i, (a, b) in enumerate(pairwise(levels)):
        d = denoise(x, a)
        known = [(a.half_logsnr, d.x0), *known][:2]
        if b.sigma > 0:
            h = b.half_logsnr - a.half_logsnr
            fresh = -math.expm1(-2 * h)
            x = (b.sigma / a.sigma * math.exp(-h)) * x + b.alpha * fresh * _to_the_middle(known, b)
            x = x + b.sigma * math.sqrt(fresh) * noise(i)
        else:
            x = b.alpha * d.x0
        yield Step(i, x, d.x0)


def unipc(order: int, kind: str = "bh2") -> Solver:
    """UniPC of order 2 or 3 (Zhao et al. 2023) with B(h) of `kind` bh1 or bh2; its corrector adds one to the order.

    The estimate at a predicted state also corrects that state, without another evaluation. The last step, to clean
    data, returns the estimate of the data; the one before it is of second order at most.
    """

    def half(h: float) -> float:
        return 0.5 * (h if kind == "bh1" else -math.expm1(-h))

    def solve(denoise: Denoiser, x: Tensor, levels: Sequence[Level], noise: Noise) -> Iterator[Step]:
        known: Known = []
        last: tuple[Level, Tensor, Known] | None = None
        for i, (a, b) in enumerate(pairwise(levels)):
            d = denoise(x, a)
            here = (a.half_logsnr, d.x0)
            # Correct the state: the last step again, now with the estimate at its end.
            if last is not None:
                before, state, used = last
                x = _exponential(state, before, a, [*used, here], half(a.half_logsnr - before.half_logsnr))
            # Predict the next one.
            known = [here, *known][: min(order, _left(levels, i))]
            h = b.half_logsnr - a.half_logsnr
            near = known[:1] if kind == "bh1" and h > _LONGEST_BH1 else known
            near = _within_reach(near, b.half_logsnr, _LOGSNR_GROWTH)
            last = (a, x, near) if math.isfinite(a.half_logsnr) else None
            x = _exponential(x, a, b, near, half(h)) if b.sigma > 0 else b.alpha * d.x0
            yield Step(i, x, d.x0)

    return solve


def _left(levels: Sequence[Level], i: int) -> int:
    """Order of step i that the steps left allow: 1 for the one to clean data, 2 for the one before it, and so on."""
    return len(levels) - 1 - i if levels[-1].sigma == 0 else len(levels)


def _within_reach(known: Known, goal: float, growth: Sequence[float] = (_GROWTH,) * 3) -> Known:
    """The newest values from which a step to `goal` may extrapolate.

    An older value is used only if the step is at most so many times as long as the interval from it to the next newer
    one: growth[0] for the second value, growth[1] for the third, and so on.
    """
    step = abs(goal - known[0][0])
    for j, (newer, older) in enumerate(pairwise(known)):
        interval = abs(newer[0] - older[0])
        if not math.isfinite(interval) or step > growth[j] * interval * _ROUNDING:
            return known[: j + 1]
    return known


def _to_the_middle(known: Known, b: Level) -> Tensor:
    """The estimate of the data extrapolated to the middle of the step to b."""
    near = _within_reach(known, b.half_logsnr, _LOGSNR_GROWTH)
    if len(near) == 1:
        return near[0][1]
    (place, x0), (older, before) = near
    share = (b.half_logsnr - place) / (2 * (place - older))
    return (1 + share) * x0 - share * before


def _integral(known: Known, low: float, high: float) -> Tensor:
    """The integral from low to high of the polynomial through the known values."""
    places = [place - low for place, _ in known]
    return _sum(known, [float(p.integ()(high - low)) for p in _lagrange(places)])


def _exponential(x: Tensor, a: Level, b: Level, known: Known, half: float) -> Tensor:
    """The exponential step from a to b, with x0(l) the polynomial through the known estimates, that at a first.

    With two estimates the weight of their difference is `half`, B(h)/2, instead of the integral's. (With three or more,
    UniPC's linear system has the integral as its solution, whatever B(h) is.)
    """
    h = b.half_logsnr - a.half_logsnr
    if not math.isfinite(h):  # from pure noise only a constant x0 can be integrated
        return (b.sigma / a.sigma) * x + b.alpha * known[0][1]
    if len(known) == 2:
        share = half * h / (known[1][0] - known[0][0])
        weights = [-math.expm1(-h) - share, share]
    else:
        # Moments ∫ u^k e^u du from -h to 0, by recursion in k; with them the weight of each estimate.
        moments = [-math.expm1(-h)]
        for k in range(1, len(known)):
            moments.append(-((-h) ** k) * math.exp(-h) - k * moments[-1])
        polynomials = _lagrange([place - b.half_logsnr for place, _ in known])
        weights = [sum(float(c) * m for c, m in zip(p.coef, moments, strict=False)) for p in polynomials]
    return (b.sigma / a.sigma) * x + b.alpha * _sum(known, weights)


def _lagrange(places: Sequence[float]) -> list[Polynomial]:
    """The polynomials that are 1 at one place and 0 at the others."""
    polynomials = []
    for j, place in enumerate(places):
        others = [other for k, other in enumerate(places) if k != j]
        product = Polynomial.fromroots(others) if others else Polynomial([1.0])
        polynomials.append(product / math.prod(place - other for other in others))
    return polynomials


def _sum(known: Known, weights: Sequence[float]) -> Tensor:
    total = weights[0] * known[0][1]
    for (_, value), weight in zip(known[1:], weights[1:], strict=True):
        total = total + weight * value
    return total
