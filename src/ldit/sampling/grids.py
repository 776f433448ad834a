"""Grids of levels by name: where the steps of a solver lie.

| name        | levels                                                                                             |
|-------------|----------------------------------------------------------------------------------------------------|
| uniform     | the process's own: DDPM the original's respacing, flow uniform in t, then the process's shift      |
| shifted:K   | noise time K·u/(1 + (K-1)·u) of uniform u (Esser et al. 2024); K > 1 dwells at noise               |
| karras      | sigma/alpha to the power 1/7 uniform (Karras et al. 2022), from 80 to 0.002, or of DDPM its own ends |
| cosine      | the angle atan(sigma/alpha) uniform, which a cosine schedule (Nichol & Dhariwal 2021) has          |
| A,B,C,…     | these noise times, falling, the first at most 1                                                    |
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

from ldit.diffusion.flow import shifted
from ldit.diffusion.process import CLEAN, MOST_STEPS, Level, Process
from ldit.errors import RequestError

_RHO = 7.0
_RATIOS = (80.0, 0.002)  # of sigma/alpha, as in Karras et al.


def build_grid(process: Process, steps: str, grid: str = "uniform") -> tuple[Level, ...]:
    """`steps` intervals of a grid (of a list as many as it has), ending in clean data. RequestError says what is wrong
    with either."""
    if grid == "uniform":
        try:
            return tuple(process.own_grid(steps))
        except ValueError as error:
            raise RequestError(f"steps: {error}") from None
    if is_listed(grid):
        return _checked(process, grid, _listed(process, grid))
    if not steps.isdecimal() or not 1 <= int(steps) <= MOST_STEPS:
        raise RequestError(f"steps: expected a number from 1 to {MOST_STEPS}, got {steps!r}")
    count = int(steps)
    kind, _, argument = grid.partition(":")
    makers: dict[str, Callable[[], Iterator[Level]]] = {
        "shifted": lambda: _shifted(process, count, argument),
        "karras": lambda: _karras(process, count),
        "cosine": lambda: _cosine(process, count),
    }
    if kind not in makers or (argument and kind != "shifted"):
        raise RequestError(
            f"grid: expected uniform, shifted:K, karras, cosine or falling noise times such as 1,0.6,0.2, got {grid!r}"
        )
    return _checked(process, grid, [*makers[kind](), CLEAN])


def is_listed(grid: str) -> bool:
    """Whether it is a list of noise times, which has its own number of steps."""
    return grid[:1].isdigit() or grid[:1] == "."


def _shifted(process: Process, count: int, argument: str) -> Iterator[Level]:
    try:
        k = float(argument)
    except ValueError:
        k = math.nan
    if not 0 < k < math.inf:
        raise RequestError(f"grid: shifted:K needs a positive number K, got {argument!r}")
    for i in range(count):
        yield process.level(shifted((count - i) / count, k))


def _karras(process: Process, count: int) -> Iterator[Level]:
    first, low = process.level(1.0), _RATIOS[1]
    high = first.sigma / first.alpha if first.alpha else _RATIOS[0]
    if process.least_noise_time:
        least = process.level(process.least_noise_time)
        low = least.sigma / least.alpha
    yield first
    for i in range(1, count):
        share = i / max(count - 1, 1)
        yield process.level_of_ratio((high ** (1 / _RHO) * (1 - share) + low ** (1 / _RHO) * share) ** _RHO)


def _cosine(process: Process, count: int) -> Iterator[Level]:
    first = process.level(1.0)
    angle = math.atan2(first.sigma, first.alpha)
    yield first
    for i in range(1, count):
        yield process.level_of_ratio(math.tan(angle * (1.0 - i / count)))


def _listed(process: Process, text: str) -> list[Level]:
    try:
        times = [float(part) for part in text.split(",")]
    except ValueError:
        raise RequestError(f"grid: expected noise times such as 1,0.6,0.2, got {text!r}") from None
    if not all(0.0 < time <= 1.0 for time in times):
        raise RequestError(f"grid: noise times lie above 0 and up to 1, got {text!r}")
    return [*(process.level(time) for time in times), CLEAN]


def _checked(process: Process, grid: str, levels: list[Level]) -> tuple[Level, ...]:
    """Solvers divide by differences of neighbours."""
    if any(b.sigma * a.alpha >= a.sigma * b.alpha for a, b in pairwise(levels)):
        least = f" and not below {process.least_noise_time:g}" if process.least_noise_time else ""
        raise RequestError(f"grid {grid!r}: {len(levels) - 1} noise times must fall from step to step{least}")
    return tuple(levels)
