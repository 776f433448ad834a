"""What every solver calls: (x, level) -> estimates of the data and the noise."""

from collections.abc import Callable

from torch import Tensor

from ldit.diffusion.process import Denoised, Level, Process

Denoiser = Callable[[Tensor, Level], Denoised]


def build_denoiser(process: Process, predict: Callable[[Tensor, Level], Tensor]) -> Denoiser:
    """A denoiser from `predict(x, level)`, the network's (guided) output, read as the process defines it."""
    return lambda x, level: process.denoised(predict(x, level), x, level)
