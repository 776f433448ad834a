"""Single-step solvers of the deterministic and the ancestral kind, which use nothing of earlier steps.

They are written in (alpha, sigma), so that the same function serves DDPM and flow models. In every loop a is the level
of the state x, b the next one, and d the estimates at a.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from torch import Tensor

from ldit.diffusion.process import Level
from ldit.sampling.denoiser import Denoiser
from ldit.sampling.step import Noise, Step


def ancestral(denoise: Denoiser, x: Tensor, levels: Sequence[Level], noise: Noise) -> Iterator[Step]:
    """DDPM (Ho et al. 2020) with learned-range variance (Nichol & Dhariwal 2021): x' ~ p(x_s | x_t).

    With r = alpha_t/alpha_s and b = sigma_t² - r²·sigma_s² (beta of the respaced chain) the mean is
    (alpha_s·b·x0 + r·sigma_s²·x)/sigma_t² and the log-variance is between log(b·sigma_s²/sigma_t²) and log b.
    """
    for i, (a, b) in enumerate(pairwise(levels)):
        d = denoise(x, a)
        # The posterior's mean.
        ratio = a.alpha / b.alpha
        beta = a.sigma**2 - ratio**2 * b.sigma**2
        x = (b.alpha * beta / a.sigma**2) * d.x0 + (ratio * b.sigma**2 / a.sigma**2) * x
        # Noise of the variance that the network predicts between its two bounds, but none in the last step.
        if b.sigma > 0:
            low, high = math.log(beta * b.sigma**2 / a.sigma**2), math.log(beta)
            if d.variance is None:
                x = x + math.exp(0.5 * high) * noise(i)
            else:
                fraction = (d.variance + 1) / 2
                x = x + (0.5 * (fraction * high + (1 - fraction) * low)).exp() * noise(i)
        yield Step(i, x, d.x0)


def ddim(denoise: Denoiser, x: Tensor, levels: Sequence[Level], noise: Noise, eta: float = 0.0) -> Iterator[Step]:
    """DDIM (Song et al. 2021): x' = alpha_s·x0 + sqrt(sigma_s² - d²)·eps + d·noise.

    d = eta·sqrt(b)·sigma_s/sigma_t with b as in `ancestral`. eta 0 is deterministic, and Euler's method on a flow;
    eta 1 has the posterior's variance.
    """
    for i, (a, b) in enumerate(pairwise(levels)):
        d = denoise(x, a)
        fresh = 0.0  # standard deviation of the noise that is added
        if eta and b.sigma > 0:
            beta = a.sigma**2 - (a.alpha / b.alpha) ** 2 * b.sigma**2
            fresh = eta * math.sqrt(beta) * b.sigma / a.sigma
        x = b.alpha * d.x0 + math.sqrt(b.sigma**2 - fresh**2) * d.eps
        if fresh:
            x = x + fresh * noise(i)
        yield Step(i, x, d.x0)


def heun(denoise: Denoiser, x: Tensor, levels: Sequence[Level], noise: Noise) -> Iterator[Step]:
    """Heun's second-order method (Karras et al. 2022) on dz/dr = eps - x0.

    z = x/(alpha+sigma) moves on a straight line over r = sigma/(alpha+sigma), whatever the process. Two evaluations a
    step, one in the last, which is Euler's as published. Where the last step is longer than the one before, as on a
    shifted grid, its error would be all that counts: there the slope is extrapolated from the last two.
    """
    before: tuple[float, Tensor] | None = None  # the last step's r and slope
    for i, (a, b) in enumerate(pairwise(levels)):
        d = denoise(x, a)
        slope = d.eps - d.x0
        # An Euler step, then again with the mean of the slopes at both ends.
        x_next = b.alpha * d.x0 + b.sigma * d.eps
        if b.sigma > 0:
            second = denoise(x_next, b)
            x_next = b.length * (x / a.length + (b.r - a.r) * 0.5 * (slope + (second.eps - second.x0)))
        elif before is not None and a.r > 1.001 * (before[0] - a.r):
            share = 0.5 * a.r / (before[0] - a.r)
            x_next = b.length * (x / a.length - a.r * (slope + share * (slope - before[1])))
        before = (a.r, slope)
        x = x_next
        yield Step(i, x, d.x0)
