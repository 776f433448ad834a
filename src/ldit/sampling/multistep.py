"""Multistep solvers: one evaluation a step; estimates of earlier steps raise the order.

Adams-Bashforth integrates dz/dr = eps - x0 in straight coordinates, z = x/(alpha+sigma), r = sigma/(alpha+sigma). The
exponential integrators DPM-Solver++ and UniPC integrate x_t = sigma_t/sigma_s·x_s + sigma_t·∫ e^l·x0(l) dl over the
half log-SNR l = log(alpha/sigma). A level of pure noise has l = -∞ and is left out of the polynomials. In every loop a
is the level of the state x, b the next one, and d the estimates at a.
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


def adams_bashforth(order: int) -> Solver:
    """The solver of 2nd, 3rd or 4th order (Bashforth & Adams 1883), for steps of any lengths.

    The first steps have few estimates to use, and their low order would limit that of the result. So the first step of
    order 3, and the first two of order 4, are corrected with an evaluation at their end: 1 and 2 evaluations more.
    """

    def solve(denoise: Denoiser, x: Tensor, levels: Sequence[Level], noise: Noise) -> Iterator[Step]:
        start = (levels[0].r, x / levels[0].length)
        known: Known = []
        for i, (a, b) in enumerate(pairwise(levels)):
            d = denoise(x, a)
            known = [(a.r, d.eps - d.x0), *known][:order]
            x = b.length * (x / a.length + _integral(known, a.r, b.r))
            # Correct the first steps: integrate again from the start, with the slope at the end of the step.
            if i < order - 2 and b.sigma > 0:
                ahead = denoise(x, b)
                x = b.length * (start[1] + _integral([(b.r, ahead.eps - ahead.x0), *known], start[0], b.r))
            yield Step(i, x, d.x0)

    return solve


def dpm_2m(denoise: Denoiser, x: Tensor, levels: Sequence[Level], noise: Noise) -> Iterator[Step]:
    """DPM-Solver++(2M) (Lu et al. 2022), second order. The last step, to clean data, returns the estimate of it."""
    before: tuple[float, Tensor] | None = None
    for i, (a, b) in enumerate(pairwise(levels)):
        d = denoise(x, a)
        if b.sigma > 0:
            h = b.half_logsnr - a.half_logsnr
            x = (b.sigma / a.sigma) * x - b.alpha * math.expm1(-h) * _extrapolated(d.x0, a, before, h)
        else:
            x = b.alpha * d.x0
        before = (a.half_logsnr, d.x0)
        yield Step(i, x, d.x0)


def dpm_2m_sde(denoise: Denoiser, x: Tensor, levels: Sequence[Level], noise: Noise) -> Iterator[Step]:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022): x' = sigma_t/sigma_s·e^-h·x + alpha_t·(1 - e^-2h)·D +
    sigma_t·sqrt(1 - e^-2h)·noise, with D as in `dpm_2m`."""
    before: tuple[float, Tensor] | None = None
    for i, (a, b) in enumerate(pairwise(levels)):
        d = denoise(x, a)
        if b.sigma > 0:
            h = b.half_logsnr - a.half_logsnr
            fresh = -math.expm1(-2 * h)
            x = (b.sigma / a.sigma * math.exp(-h)) * x + b.alpha * fresh * _extrapolated(d.x0, a, before, h)
            x = x + b.sigma * math.sqrt(fresh) * noise(i)
        else:
            x = b.alpha * d.x0
        before = (a.half_logsnr, d.x0)
        yield Step(i, x, d.x0)


def unipc_2(denoise: Denoiser, x: Tensor, levels: Sequence[Level], noise: Noise) -> Iterator[Step]:
    """UniPC of order 2 (Zhao et al. 2023) with varying coefficients; its corrector raises the order to three.

    The estimate at a predicted state also corrects that state, without another evaluation. The last step, to clean
    data, returns the estimate of the data.
    """
    known: Known = []
    last: tuple[Level, Tensor] | None = None
    for i, (a, b) in enumerate(pairwise(levels)):
        d = denoise(x, a)
        known = [(a.half_logsnr, d.x0), *known][:3]
        # Correct the state: the last step again, now with the estimate at its end.
        if last is not None and last[0].alpha > 0:
            x = _exponential(last[1], last[0], a, known)
        last = (a, x)
        # Predict the next one.
        x = _exponential(x, a, b, known[:2]) if b.sigma > 0 else b.alpha * d.x0
        yield Step(i, x, d.x0)


def _extrapolated(x0: Tensor, a: Level, before: tuple[float, Tensor] | None, h: float) -> Tensor:
    """The estimate of the data extrapolated to the middle of the next step, which is h long."""
    if before is None or not math.isfinite(before[0]):
        return x0
    share = h / (2 * (a.half_logsnr - before[0]))
    return (1 + share) * x0 - share * before[1]


def _integral(known: Known, low: float, high: float) -> Tensor:
    """The integral from low to high of the polynomial through the known values."""
    places = [place - low for place, _ in known]
    return _sum(known, [float(p.integ()(high - low)) for p in _lagrange(places)])


def _exponential(x: Tensor, a: Level, b: Level, known: Known) -> Tensor:
    """The exponential step from a to b, with x0(l) the polynomial through the known estimates."""
    finite = [pair for pair in known if math.isfinite(pair[0])] or known[:1]
    h = b.half_logsnr - a.half_logsnr
    if not math.isfinite(h):  # from pure noise only a constant x0 can be integrated
        return (b.sigma / a.sigma) * x + b.alpha * known[0][1]
    # Moments ∫ u^k e^u du from -h to 0, by recursion in k; with them the weight of each estimate.
    moments = [-math.expm1(-h)]
    for k in range(1, len(finite)):
        moments.append(-((-h) ** k) * math.exp(-h) - k * moments[-1])
    polynomials = _lagrange([place - b.half_logsnr for place, _ in finite])
    weights = [sum(float(c) * m for c, m in zip(p.coef, moments, strict=False)) for p in polynomials]
    return (b.sigma / a.sigma) * x + b.alpha * _sum(finite, weights)


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
