"""dopri5: a solver that chooses its own steps, as many as a tolerance needs (Dormand & Prince 1980).

It integrates dz/dr = eps - x0 in straight coordinates, z = x/(alpha+sigma), r = sigma/(alpha+sigma), with a formula of
fifth order; the difference to one of fourth order estimates the error of a step. Six evaluations a step.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from ldit.diffusion.process import Level
from ldit.sampling.denoiser import Denoiser
from ldit.sampling.step import Noise, Solver, Step

# The method's table: places of the stages, weights of earlier slopes at each, and weights of the error estimate. The
# weights of the last stage are those of the result, so that its slope is the first one of the next step.
_PLACES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
_LEAST = 1e-3  # sigma/alpha at which the integration ends; the error of the step from there to clean data is 1e-6
_LONGEST = 1 / 8  # of the whole way: over longer steps the estimate of the error is not to be trusted
_SHORTEST = 1e-4  # of the whole way: a step this short is accepted whatever its error, so that every request ends
_ABSOLUTE = 1e-3  # the absolute tolerance in parts of the relative one: SiT's 1e-6 and 1e-3


class _Slope(NamedTuple):
    """dz/dr at a place, and the estimate of the data that it belongs to."""

    value: Tensor
    x0: Tensor


def dopri5(level_of_ratio: Callable[[float], Level], tolerance: float) -> Solver:
    """The solver whose steps err by at most `tolerance` times (1e-3 + the root mean square of the image z).

    Of the grid it uses only the two ends. `level_of_ratio` is the process's. The steps fit the image that needs the
    shortest ones, so a batch of one image is what makes an image independent of its company.
    """

    def solve(denoise: Denoiser, x: Tensor, levels: Sequence[Level], noise: Noise) -> Iterator[Step]:
        def slope_at(r: float, z: Tensor) -> _Slope:
            level = levels[0] if r == levels[0].r else level_of_ratio(r / (1.0 - r) if r < 1.0 else math.inf)
            d = denoise(z * level.length, level)
            return _Slope(d.eps - d.x0, d.x0)

        # From the noisiest level to the last one, or to the least noisy that a network can be asked about.
        r, z = levels[0].r, x / levels[0].length
        end = level_of_ratio(_LEAST) if levels[-1].sigma == 0 else levels[-1]
        way, reported = r - end.r, 0
        first = slope_at(r, z)
        # A first step on which the state moves by about 1 % of itself (Hairer, Norsett & Wanner, II.4).
        h = 0.01 * _size(z, z, z, tolerance) / max(_size(first.value, z, z, tolerance), 1e-12)
        while r - end.r > 1e-12:
            h = min(max(h, _SHORTEST * way), _LONGEST * way, r - end.r)
            # The six further stages; r falls, so all slopes count negatively.
            slopes = [first]
            for place, weights in zip(_PLACES, _STAGES, strict=True):
                reached = z - h * _sum(weights, slopes)
                slopes.append(slope_at(max(r - place * h, end.r), reached))
            error = _size(h * _sum(_ERROR, slopes), z, reached, tolerance)
            # Accept the step if its error is within the tolerance, and report the grid's levels that it has passed.
            if error <= 1.0 or h <= _SHORTEST * way:
                while reported < len(levels) - 2 and levels[reported + 1].r >= r - h:
                    passed = levels[reported + 1]
                    state = _between(z, first.value, reached, slopes[-1].value, h, (r - passed.r) / h)
                    yield Step(reported, passed.length * state, first.x0)
                    reported += 1
                r, z, first = r - h, reached, slopes[-1]
            # The next step: its error grows with the fifth power of its length.
            h *= min(10.0, max(0.2, 0.9 * max(error, 1e-10) ** -0.2))
        # To clean data, the estimate of it.
        state = levels[-1].alpha * first.x0 if levels[-1].sigma == 0 else levels[-1].length * z
        for left in range(reported, len(levels) - 1):
            yield Step(left, state, first.x0)

    return solve


def _size(x: Tensor, before: Tensor, after: Tensor, tolerance: float) -> float:
    """The largest value of x in units of the tolerance, over all images.

    The unit is one for the whole image: with one for each value, those near zero would ask for more digits than a
    network in half precision has.
    """
    unit = _ABSOLUTE + _mean_square(before).maximum(_mean_square(after)).sqrt()
    return float((x.abs().reshape(len(x), -1).amax(1) / (tolerance * unit)).max())


def _mean_square(x: Tensor) -> Tensor:
    """Of each image (B,)."""
    return x.reshape(len(x), -1).square().mean(1)


def _sum(weights: Sequence[float], slopes: Sequence[_Slope]) -> Tensor:
    total = weights[0] * slopes[0].value
    for weight, slope in zip(weights[1:], slopes[1:], strict=True):
        if weight:
            total = total + weight * slope.value
    return total


def _between(z: Tensor, slope: Tensor, after: Tensor, slope_after: Tensor, h: float, share: float) -> Tensor:
    """The state at a share of the step, by the cubic through the states and slopes at both ends; r falls."""
    t = share
    moved, first, last = after - z, -h * slope, -h * slope_after
    return z + t * first + t * t * (3 * moved - 2 * first - last) + t**3 * (first + last - 2 * moved)
