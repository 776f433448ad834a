"""The interface of a diffusion process: training times, losses, noise levels, estimates from a network's output."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ldit.config.sections import ObjectiveConfig

MOST_STEPS = 100_000
"""Largest number of sampling steps."""


class Prediction(NamedTuple):
    """A network's output, and whatever else a loss of the user's may need."""

    out: Tensor
    aux: Any = None


Predict = Callable[[Tensor, Tensor], Tensor | Prediction]
"""predict(x_t, network_time) -> output; x_t (B, C, H, W), network_time (B,)."""


@dataclass(frozen=True)
class Level:
    """A noise level: x = alpha·x0 + sigma·eps.

    `time` is what the network is given. `noise_time` in [0, 1] is the same for every process: 0 = data, 1 = noise.
    """

    alpha: float
    sigma: float
    time: float
    noise_time: float

    @property
    def length(self) -> float:
        """alpha + sigma: x divided by it moves on a straight line from data to noise."""
        return self.alpha + self.sigma

    @property
    def r(self) -> float:
        """sigma/(alpha + sigma), the time along that line: 0 = data, 1 = noise."""
        return self.sigma / self.length

    @property
    def half_logsnr(self) -> float:
        """log(alpha/sigma): inf for clean data, -inf for pure noise."""
        if not self.alpha or not self.sigma:
            return math.inf if self.alpha else -math.inf
        return math.log(self.alpha / self.sigma)


CLEAN = Level(1.0, 0.0, math.nan, 0.0)
"""Data without noise, the end of every grid."""


class Denoised(NamedTuple):
    """Estimates of data and noise at a level, x = alpha·x0 + sigma·eps, each (B, C, H, W).

    `variance` in about [-1, 1] interpolates the log of the step's variance between the posterior's (-1) and the
    forward process's (1). It is None for networks that do not learn a variance.
    """

    x0: Tensor
    eps: Tensor
    variance: Tensor | None = None


class Process(Protocol):
    """A diffusion process and the conventions of its network. Noise and generators come from outside.

    Times t (B,) are in the process's own scale (DDPM: indices; flow: 0 = data to 1 = noise). Noise times are floats in
    [0, 1], the same for every process.
    """

    @property
    def least_noise_time(self) -> float:
        """Smallest noise time that the process has a level for; 0 if there is no smallest."""
        ...

    def draw_times(self, generators: Sequence[torch.Generator], config: ObjectiveConfig) -> Tensor:
        """Training times t (B,), one from each generator."""
        ...

    def times_at(self, share: Tensor) -> Tensor:
        """Times t (B,) at these fractions, in [0, 1), of the time range: for measurements at fixed times."""
        ...

    def noise_times(self, t: Tensor) -> Tensor:
        """Noise times in [0, 1] of times t (B,)."""
        ...

    def network_time(self, t: Tensor) -> Tensor:
        """What the network is given for times t (B,)."""
        ...

    def noise_time_of(self, network_time: float) -> float:
        """The noise time of what the network is given: the inverse of `Level.time`."""
        ...

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t (B, C, H, W) of data x0, times t (B,) and noise."""
        ...

    def losses(self, predict: Predict, x0: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Per-sample values (B,): "loss" is minimised, the others are logged. x0, noise (B, C, H, W) fp32."""
        ...

    def heldout_error(self, losses: dict[str, Tensor], t: Tensor) -> Tensor:
        """Squared error of eps (B,), comparable across processes, from the values of `losses`."""
        ...

    def level(self, noise_time: float) -> Level:
        """The level at a noise time in (0, 1]."""
        ...

    def level_of_ratio(self, ratio: float) -> Level:
        """The level with sigma/alpha = ratio, or the noisiest if none is as noisy."""
        ...

    def own_grid(self, steps: str) -> list[Level]:
        """The process's own sampling grid, noisiest first, CLEAN last. ValueError for `steps` it does not support."""
        ...

    def denoised(self, out: Tensor, x: Tensor, level: Level) -> Denoised:
        """Estimates of data and noise from the network's (guided) output at x (B, C, H, W)."""
        ...


def samples_alike(one: Process, other: Process) -> bool:
    """Whether two processes sample a network in the same way: equal levels, and equal estimates from one output.

    Not when a process fails on the question: a user's may support other numbers of steps or channels.
    """
    numbers = torch.linspace(-1, 1, 12)
    x, out = numbers[:4].view(1, 1, 2, 2), numbers[4:].view(1, 2, 2, 2)  # one channel, and its variance
    try:
        if one.own_grid("4") != other.own_grid("4"):
            return False
        estimates = [process.denoised(out, x, one.level(0.5)) for process in (one, other)]
        return all(torch.equal(a, b) for a, b in zip(estimates[0][:2], estimates[1][:2], strict=True))
    except Exception:
        return False


def output_of(prediction: Tensor | Prediction) -> Tensor:
    """The output in fp32: losses are computed in fp32 whatever the network's dtype."""
    return (prediction.out if isinstance(prediction, Prediction) else prediction).float()


def per_sample(x: Tensor) -> Tensor:
    """Mean over all axes but the first."""
    return x.flatten(1).mean(1)
