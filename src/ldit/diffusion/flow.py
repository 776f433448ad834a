"""Flow matching on straight lines: x_t = (1-t)·x0 + t·noise, so 0 is data and 1 noise (Lipman et al. 2023)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ldit.config.sections import ObjectiveConfig
from ldit.diffusion.process import CLEAN, MOST_STEPS, Denoised, Level, Predict, output_of, per_sample

LEAST_TIME = 0.05  # t is clamped to this where a data prediction is turned into a velocity (JiT)
LEAST_LENGTH = 0.1
"""A velocity shorter than this counts as this long where directions are compared. A fresh network predicts zero: its
gradient would be 1e7 times that of the squared error, and rounding would decide where it points."""


@dataclass(frozen=True)
class Flow:
    """The flow process and the conventions of its network.

    `data_at`: native time of the data, 0 here and 1 in SiT. The network is given native time x `time_scale`, and
    predicts the native velocity ("v") or the data ("x0"). `shift`: resolution shift of times (Esser et al. 2024).
    `min_snr` and `direction` change the loss, see `losses`.
    """

    prediction: Literal["v", "x0"] = "v"
    time_scale: float = 1000.0
    data_at: Literal[0, 1] = 0
    shift: float = 1.0
    min_snr: float = 0.0
    direction: float = 0.0

    @property
    def least_noise_time(self) -> float:
        """0: a flow has levels arbitrarily close to the data."""
        return 0.0

    def draw_times(self, generators: Sequence[torch.Generator], config: ObjectiveConfig) -> Tensor:
        """Logit-normal, t = sigmoid(mean + std·normal) (Esser et al. 2024), or uniform; then the resolution shift."""
        if config.times == "uniform":
            t = torch.cat([torch.rand((1,), generator=one) for one in generators])
        else:
            normal = torch.cat([torch.randn((1,), generator=one) for one in generators])
            t = torch.sigmoid(config.time_mean + config.time_std * normal)
        return self.shift * t / (1.0 + (self.shift - 1.0) * t)

    def times_at(self, share: Tensor) -> Tensor:
        """The share itself."""
        return share

    def noise_times(self, t: Tensor) -> Tensor:
        """t itself."""
        return t

    def network_time(self, t: Tensor) -> Tensor:
        """Native time x time_scale."""
        return (t if self.data_at == 0 else 1.0 - t) * self.time_scale

    def noise_time_of(self, network_time: float) -> float:
        """The inverse of `network_time`."""
        native = network_time / self.time_scale
        return native if self.data_at == 0 else 1.0 - native

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """(1-t)·x0 + t·noise."""
        t = _per_row(t, x0)
        return (1.0 - t) * x0 + t * noise

    def velocity(self, out: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """dx/dt = noise - x0 from the network's output; of 2C channels (SiT) only the first C are used."""
        out = out[:, : x_t.shape[1]]
        if self.prediction == "x0":
            return (x_t - out) / _per_row(t, x_t).clamp(min=LEAST_TIME)
        return out if self.data_at == 0 else -out

    def losses(self, predict: Predict, x0: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Squared error of the velocity, per sample: {"loss", "mse"}, each (B,).

        With `min_snr` gamma the error counts min(SNR, gamma)·t² in the loss, so that the squared error of the data
        counts min(SNR, gamma) (Hang et al. 2023). With `direction` w the loss has w·(1 - cos) besides, of predicted and
        true velocity over the channels of each place, logged as "direction" (Yao et al. 2025).

        x0, noise (B, C, H, W) fp32; t (B,) in [0, 1]; `predict` is given x_t and `network_time(t)`.
        """
        x_t = self.q_sample(x0, t, noise)
        out = output_of(predict(x_t, self.network_time(t)))
        # For t below LEAST_TIME the target is scaled as the estimate is, so that a perfect x0 still has zero loss.
        target = self.velocity(x0, x_t, t) if self.prediction == "x0" else noise - x0
        velocity = self.velocity(out, x_t, t)
        mse = per_sample((velocity - target).square())
        losses = {"loss": mse, "mse": mse}
        if self.min_snr:
            # SNR = ((1-t)/t)². The velocity of a data prediction is its error over a time that is clamped.
            snr = ((1.0 - t) / t.clamp(min=1e-6)).square().clamp(max=self.min_snr)
            over = t.clamp(min=LEAST_TIME) if self.prediction == "x0" else t
            losses["loss"] = mse * snr * over.square()
        if self.direction:
            losses["direction"] = per_sample(1.0 - F.cosine_similarity(velocity, target, dim=1, eps=LEAST_LENGTH))
            losses["loss"] = losses["loss"] + self.direction * losses["direction"]
        return losses

    def heldout_error(self, losses: dict[str, Tensor], t: Tensor) -> Tensor:
        """Squared error (B,) of eps = x_t + (1-t)·v, comparable across processes."""
        return (1.0 - t).square() * losses["mse"]

    def level(self, noise_time: float) -> Level:
        """alpha = 1 - t, sigma = t."""
        t = noise_time
        return Level(1.0 - t, t, (t if self.data_at == 0 else 1.0 - t) * self.time_scale, t)

    def level_of_ratio(self, ratio: float) -> Level:
        """t = ratio / (1 + ratio)."""
        return self.level(ratio / (1.0 + ratio) if math.isfinite(ratio) else 1.0)

    def own_grid(self, steps: str) -> list[Level]:
        """Uniform in t from 1 to 0, then shifted."""
        if not steps.isdecimal() or not 1 <= int(steps) <= MOST_STEPS:
            raise ValueError(f"expected a number from 1 to {MOST_STEPS}, got {steps!r}")
        count = int(steps)
        return [self.level(shifted((count - i) / count, self.shift)) for i in range(count)] + [CLEAN]

    def denoised(self, out: Tensor, x: Tensor, level: Level) -> Denoised:
        """x0 and eps from the first C channels, which predict x0 or the velocity eps - x0."""
        out = out[:, : x.shape[1]]
        if self.prediction == "x0":
            return Denoised(out, (x - level.alpha * out) / level.sigma)
        velocity = out if self.data_at == 0 else -out
        return Denoised(x - level.sigma * velocity, x + level.alpha * velocity)


def shifted(u: float, k: float) -> float:
    """k·u/(1 + (k-1)·u), noisier for k > 1. This form gives exactly 1 for u = 1, never a level beyond pure noise."""
    return k * u / (k * u + (1.0 - u))


def _per_row(t: Tensor, like: Tensor) -> Tensor:
    """t (B,) in a shape that multiplies `like` (B, C, H, W) row by row."""
    return t.view(-1, *[1] * (like.ndim - 1))
