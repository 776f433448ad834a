"""SiT's stochastic sampler (Ma et al. 2024): the reverse-time SDE with a diffusion coefficient of one's choice.

In straight coordinates z = x/(alpha+sigma), r = sigma/(alpha+sigma) it is, backwards in r from 1 = noise to 0 = data,

    dz = (eps - x0 + D(r)·eps/r) dr + sqrt(2 D(r)) dW.

Every D >= 0 leads from noise to the same distribution; D = 0 is the ODE. SiT writes w = 2 D, and t = 1 - r.

| diffusion               | D(r)                           |                                                          |
|-------------------------|--------------------------------|----------------------------------------------------------|
| constant                | c                              |                                                          |
| sigma, linear           | c·r                            | SiT's default                                            |
| sbdm                    | c·r/(1 - r)                    | the forward process's own; infinite in pure noise, where |
|                         |                                | that at the end of the step is used                      |
| decreasing              | (c·cos(pi·(1 - r)) + 1)²/4     |                                                          |
| increasing-decreasing   | c·sin(pi·(1 - r))²             |                                                          |

c is 1, or what follows the name: `sigma:0.5`. The last step goes to clean data:

| last step       | state                                                                                       |
|-----------------|---------------------------------------------------------------------------------------------|
| mean            | a step without its noise (SiT's default)                                                     |
| tweedie, euler  | the estimate of the data, which Tweedie's formula and a step of the ODE both give           |
| none            | a step like all others, noise included                                                      |

`mean:0.04` sets its length: see `ldit.sampling.grids.build_grid`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from torch import Tensor

from ldit.diffusion.process import Level
from ldit.errors import RequestError
from ldit.sampling.denoiser import Denoiser
from ldit.sampling.step import Noise, Solver, Step

DIFFUSIONS: dict[str, Callable[[float, float], float]] = {
    "constant": lambda r, c: c,
    "sigma": lambda r, c: c * r,
    "linear": lambda r, c: c * r,
    "sbdm": lambda r, c: c * r / (1.0 - r) if r < 1.0 else math.inf,
    "decreasing": lambda r, c: (c * math.cos(math.pi * (1.0 - r)) + 1.0) ** 2 / 4.0,
    "increasing-decreasing": lambda r, c: c * math.sin(math.pi * (1.0 - r)) ** 2,
}
"""D by r and c."""
LAST_STEPS = ("mean", "tweedie", "euler", "none")


def euler_maruyama(diffusion: str = "sigma", last_step: str = "tweedie") -> Solver:
    """The sampler by the Euler-Maruyama method, with a `diffusion` and a `last_step` of the tables above.

    RequestError names the one that is unknown.
    """
    coefficient = _coefficient(diffusion)
    last, _ = parse_last_step(last_step)

    def solve(denoise: Denoiser, x: Tensor, levels: Sequence[Level], noise: Noise) -> Iterator[Step]:
        for i, (a, b) in enumerate(pairwise(levels)):
            d = denoise(x, a)
            if b.sigma == 0 and last in ("tweedie", "euler"):
                x = b.alpha * d.x0
            else:
                h, strength = a.r - b.r, coefficient(a.r)
                if math.isinf(strength):
                    strength = coefficient(b.r)
                z = x / a.length + h * (d.x0 - (1.0 + strength / a.r) * d.eps)
                if b.sigma > 0 or last == "none":
                    z = z + math.sqrt(2.0 * strength * h) * noise(i)
                x = b.length * z
            yield Step(i, x, d.x0)

    return solve


def _coefficient(diffusion: str) -> Callable[[float], float]:
    """D by r alone."""
    name, given, text = diffusion.lower().partition(":")
    scale = _number(text) if given else 1.0
    if name not in DIFFUSIONS or not 0.0 <= scale < math.inf:
        raise RequestError(
            f"diffusion: expected one of {', '.join(DIFFUSIONS)}, or such a name with a factor as in sigma:0.5, got "
            f"{diffusion!r}"
        )
    form = DIFFUSIONS[name]
    return lambda r: form(r, scale)


def parse_last_step(text: str) -> tuple[str, float | None]:
    """The name of a last step and its length in noise time, None = that of the grid. RequestError if unknown."""
    name, given, number = text.lower().partition(":")
    length = _number(number) if given else None
    if name not in LAST_STEPS or (length is not None and not 0.0 < length < 1.0):
        raise RequestError(
            f"last_step: expected one of {', '.join(LAST_STEPS)}, or such a name with a length of noise time as in "
            f"mean:0.04, got {text!r}"
        )
    return name, length


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
