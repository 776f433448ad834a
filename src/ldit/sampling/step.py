"""What every solver yields and is given."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from ldit.diffusion.process import Level
from ldit.sampling.denoiser import Denoiser

Noise = Callable[[int], Tensor]


class Step(NamedTuple):
    """After step `number` (0 = noisiest): the state and the estimate of the data it rests on."""

    number: int
    x: Tensor
    x0: Tensor


Solver = Callable[[Denoiser, Tensor, Sequence[Level], Noise], Iterator[Step]]
"""(denoiser, start, levels, noise) -> steps. `noise(i)` gives step i's standard normal numbers, shaped as x;
deterministic solvers never call it."""
