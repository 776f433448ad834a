"""Solvers: plain generators over a denoiser, a start and a grid of levels. State is fp32; each yield is one step done.

Written in (alpha, sigma), so that the same function serves DDPM and flow models. `noise(i)` gives step i's standard
normal numbers, shaped as x; deterministic solvers never call it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from ldit.errors import RequestError
from ldit.sampling.denoiser import Denoiser
from ldit.sampling.levels import Level

Noise = Callable[[int], Tensor]


class Step(NamedTuple):
    """After step `number` (0 = noisiest): the state and the estimate of the data it rests on."""

    number: int
    x: Tensor
    x0: Tensor


Solver = Callable[[Denoiser, Tensor, Sequence[Level], Noise], Iterator[Step]]


def ancestral(denoise: Denoiser, x: Tensor, levels: Sequence[Level], noise: Noise) -> Iterator[Step]:
    """DDPM (Ho et al. 2020) with learned-range variance (Nichol & Dhariwal 2021): x' ~ p(x_s | x_t).

    With r = alpha_t/alpha_s and b = sigma_t² - r²·sigma_s² (beta of the respaced chain) the mean is
    (alpha_s·b·x0 + r·sigma_s²·x)/sigma_t² and the log-variance lies between log(b·sigma_s²/sigma_t²) and log b.
    """
    for i, (a, b) in enumerate(pairwise(levels)):
        d = denoise(x, a)
        ratio = a.alpha / b.alpha
        beta = a.sigma**2 - ratio**2 * b.sigma**2
        x = (b.alpha * beta / a.sigma**2) * d.x0 + (ratio * b.sigma**2 / a.sigma**2) * x
        if b.sigma > 0:
            low, high = math.log(beta * b.sigma**2 / a.sigma**2), math.log(beta)
            if d.variance is None:
                x = x + math.exp(0.5 * high) * noise(i)
            else:
                fraction = (d.variance + 1) / 2
                x = x + (0.5 * (fraction * high + (1 - fraction) * low)).exp() * noise(i)
        yield Step(i, x, d.x0)


def ddim(denoise: Denoiser, x: Tensor, levels: Sequence[Level], noise: Noise) -> Iterator[Step]:
    """DDIM without noise (Song et al. 2021): x' = alpha_s·x0 + sigma_s·eps. On a flow this is Euler's method."""
    for i, (a, b) in enumerate(pairwise(levels)):
        d = denoise(x, a)
        x = b.alpha * d.x0 + b.sigma * d.eps
        yield Step(i, x, d.x0)


def heun(denoise: Denoiser, x: Tensor, levels: Sequence[Level], noise: Noise) -> Iterator[Step]:
    """Heun's second-order method on dz/dr = eps - x0 with z = x/(alpha+sigma), r = sigma/(alpha+sigma), the straight
    coordinates of any such process. Two evaluations a step; one in the last, which ends at clean data."""
    for i, (a, b) in enumerate(pairwise(levels)):
        d = denoise(x, a)
        x_next = b.alpha * d.x0 + b.sigma * d.eps
        if b.sigma > 0:
            second = denoise(x_next, b)
            scale_a, scale_b = a.alpha + a.sigma, b.alpha + b.sigma
            step = b.sigma / scale_b - a.sigma / scale_a
            slope = 0.5 * ((d.eps - d.x0) + (second.eps - second.x0))
            x_next = scale_b * (x / scale_a + step * slope)
        x = x_next
        yield Step(i, x, d.x0)


SOLVERS: dict[str, Solver] = {"ddpm": ancestral, "ddim": ddim, "euler": ddim, "heun": heun}
PLANNED = ("ab2", "ab3", "ab4", "dpm++", "dpm++2m", "dpm++2m-sde", "unipc2", "euler-maruyama")


def find_solver(name: str) -> Solver:
    """The solver of that name, or RequestError."""
    if name in PLANNED:
        raise RequestError(f"solver {name!r} is not built yet (there are: {', '.join(SOLVERS)})")
    if name not in SOLVERS:
        raise RequestError(f"unknown solver {name!r} (there are: {', '.join(SOLVERS)})")
    return SOLVERS[name]
