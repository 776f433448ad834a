"""One interface for every solver: (x, level) -> estimates of the data and the noise."""

from collections.abc import Callable

from torch import Tensor

from ldit.diffusion.process import Denoised, Level, Process

Denoiser = Callable[[Tensor, Level], Denoised]


def build_denoiser(process: Process, predict: Callable[[Tensor, Level], Tensor]) -> Denoiser:
    """Adapt a network's (guided) output to estimates, by what the process trains it to predict."""
    return lambda x, level: process.denoised(predict(x, level), x, level)
