"""Grids by name: the levels that a solver visits.

| name        | levels                                                                                             |
|-------------|----------------------------------------------------------------------------------------------------|
| uniform     | the process's own. DDPM: the original's respacing. Flow: uniform in t, then the process's shift    |
| shifted:K   | noise time K·u/(1 + (K-1)·u) of uniform u (Esser et al. 2024); K > 1 spends more steps near noise  |
| karras      | (sigma/alpha)^(1/7) uniform (Karras et al. 2022), from 80 to 0.002; for DDPM between its own ends  |
| logsnr      | log(alpha/sigma) uniform, between the same ends as karras                                          |
| cosine      | the angle atan(sigma/alpha) uniform, as a cosine schedule has it (Nichol & Dhariwal 2021)          |
| A,B,C,…     | these noise times, falling, each above 0 and at most 1                                             |
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

from ldit.diffusion.flow import shifted
from ldit.diffusion.process import CLEAN, MOST_STEPS, Level, Process
from ldit.errors import RequestError

_RHO = 7.0
_RATIOS = (80.0, 0.002)  # of sigma/alpha, as in Karras et al.


def build_grid(process: Process, steps: str, grid: str = "uniform", last: float | None = None) -> tuple[Level, ...]:
    """The levels of `steps` intervals, noisiest first, clean data last. A list has its own number of steps.

    `last` is the length in noise time L of the last step, as in SiT: the grid of one step less, with L + (1 - L)·t for
    its noise times t, then the step from L to clean data. RequestError names what is wrong with `steps` or `grid`.
    """
    if last is not None:
        if not steps.isdecimal() or int(steps) < 2 or is_listed(grid):
            raise RequestError(f"last_step: a length needs a number of steps from 2 and a grid by name, got {steps!r}")
        *before, _ = build_grid(process, str(int(steps) - 1), grid)
        times = [last + (1.0 - last) * level.noise_time for level in before]
        return _checked(process, grid, [*(process.level(time) for time in (*times, last)), CLEAN])
    # The process's own grid also takes its own strings as steps, such as "ddim50".
    if grid == "uniform":
        try:
            return tuple(process.own_grid(steps))
        except ValueError as error:
            raise RequestError(f"steps: {error}") from None
    if is_listed(grid):
        return _checked(process, grid, _listed(process, grid))
    if not steps.isdecimal() or not 1 <= int(steps) <= MOST_STEPS:
        raise RequestError(f"steps: expected a number from 1 to {MOST_STEPS}, got {steps!r}")
    # The others by name, each from a number of steps.
    count = int(steps)
    kind, _, argument = grid.partition(":")
    makers: dict[str, Callable[[], Iterator[Level]]] = {
        "shifted": lambda: _shifted(process, count, argument),
        "karras": lambda: _karras(process, count),
        "logsnr": lambda: _logsnr(process, count),
        "cosine": lambda: _cosine(process, count),
    }
    if kind not in makers or (argument and kind != "shifted"):
        raise RequestError(
            "grid: expected uniform, shifted:K, karras, logsnr, cosine or falling noise times such as 1,0.6,0.2, "
            f"got {grid!r}"
        )
    return _checked(process, grid, [*makers[kind](), CLEAN])


def is_listed(grid: str) -> bool:
    """Whether the grid is a list of noise times, which sets the number of steps."""
    return grid[:1].isdigit() or grid[:1] == "."


def _shifted(process: Process, count: int, argument: str) -> Iterator[Level]:
    try:
        k = float(argument)
    except ValueError:
        k = math.nan
    if not 0 < k < math.inf:
        raise RequestError(f"grid: shifted:K needs a positive number K, got {argument!r}")
    most = process.level(1.0).noise_time  # below 1 for processes whose noisiest level is
    for i in range(count):
        yield process.level(most * shifted((count - i) / count, k))


def _karras(process: Process, count: int) -> Iterator[Level]:
    high, low = _ends(process)
    yield process.level(1.0)
    for i in range(1, count):
        share = i / max(count - 1, 1)
        yield process.level_of_ratio((high ** (1 / _RHO) * (1 - share) + low ** (1 / _RHO) * share) ** _RHO)


def _logsnr(process: Process, count: int) -> Iterator[Level]:
    high, low = _ends(process)
    yield process.level(1.0)
    for i in range(1, count):
        yield process.level_of_ratio(high * (low / high) ** (i / max(count - 1, 1)))


def _ends(process: Process) -> tuple[float, float]:
    """sigma/alpha of the noisiest and the least noisy level; Karras et al.'s values where the process has no such
    end."""
    first, least = process.level(1.0), process.level(process.least_noise_time) if process.least_noise_time else None
    high = first.sigma / first.alpha if first.alpha else math.inf
    return (high, least.sigma / least.alpha) if least else (min(high, _RATIOS[0]), _RATIOS[1])


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
        raise RequestError(f"grid: noise times must be above 0 and at most 1, got {text!r}")
    return [*(process.level(time) for time in times), CLEAN]


def _checked(process: Process, grid: str, levels: list[Level]) -> tuple[Level, ...]:
    """The levels, or RequestError unless noise falls at every step: solvers divide by the differences."""
    if any(b.sigma * a.alpha >= a.sigma * b.alpha for a, b in pairwise(levels)):
        least = f" and not below {process.least_noise_time:g}" if process.least_noise_time else ""
        most = process.level(1.0).noise_time
        least += f", from at most {most:g}" if most < 1.0 else ""
        raise RequestError(f"grid {grid!r}: {len(levels) - 1} noise times must fall from step to step{least}")
    return tuple(levels)
