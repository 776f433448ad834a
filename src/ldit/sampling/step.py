"""The interface of a solver: its arguments, and the steps that it yields."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from ldit.diffusion.process import Level
from ldit.sampling.denoiser import Denoiser

Noise = Callable[[int], Tensor]
"""noise(i): standard normal numbers of solver step i, shaped as x."""


class Step(NamedTuple):
    """The state x after step `number` (0 = noisiest), and the estimate x0 of the data that led to it."""

    number: int
    x: Tensor
    x0: Tensor


Solver = Callable[[Denoiser, Tensor, Sequence[Level], Noise], Iterator[Step]]
"""(denoiser, start (B, C, H, W), levels, noise) -> one Step for each interval of levels.

Deterministic solvers never call `noise`.
"""
