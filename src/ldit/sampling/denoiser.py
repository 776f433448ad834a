"""One interface for every solver: (x, level) -> estimates of the data and the noise."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ldit.diffusion.build import Process
from ldit.diffusion.ddpm import DDPM
from ldit.sampling.levels import Level


class Denoised(NamedTuple):
    """x = alpha·x0 + sigma·eps. `variance` in about [-1, 1] interpolates the log of the step's variance between the
    posterior's (-1) and the forward process's (1); None for networks that do not learn it."""

    x0: Tensor
    eps: Tensor
    variance: Tensor | None = None


Denoiser = Callable[[Tensor, Level], Denoised]


def build_denoiser(process: Process, predict: Callable[[Tensor, Level], Tensor]) -> Denoiser:
    """Adapt a network's (guided) output to estimates, by what the process trains it to predict."""
    if isinstance(process, DDPM):
        return lambda x, level: _from_eps(predict(x, level), x, level)

    def denoise(x: Tensor, level: Level) -> Denoised:
        out = predict(x, level)[:, : x.shape[1]]
        if process.prediction == "x0":
            return Denoised(out, (x - level.alpha * out) / level.sigma)
        velocity = out if process.data_at == 0 else -out
        return Denoised(x - level.sigma * velocity, x + level.alpha * velocity)

    return denoise


def _from_eps(out: Tensor, x: Tensor, level: Level) -> Denoised:
    channels = x.shape[1]
    eps = out[:, :channels]
    # sqrt(1/a)·x - sqrt(1/a - 1)·eps
    x0 = x * (1.0 / level.alpha) - eps * (level.sigma / level.alpha)
    return Denoised(x0, eps, out[:, channels:] if out.shape[1] == 2 * channels else None)
