"""Flow matching: x_t on a path from data at t = 0 to noise at t = 1, by default the straight line (1-t)·x0 + t·noise
(Lipman et al. 2023)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ldit.config.sections import ObjectiveConfig
from ldit.config.spec import PathName, Predicted
from ldit.diffusion.path import PATHS, Path
from ldit.diffusion.process import CLEAN, MOST_STEPS, Denoised, Level, Predict, output_of, per_sample

NOISE_EDGE = 1e-3  # t of a network that predicts eps or the score is this far from both ends (SiT)
LEAST_TIME = 0.05  # t is clamped to this where a data prediction is turned into a velocity (JiT)
LEAST_LENGTH = 0.1
"""A velocity shorter than this counts as this long where directions are compared. A fresh network predicts zero: its
gradient would be 1e7 times that of the squared error, and rounding would decide where it points."""


@dataclass(frozen=True)
class Flow:
    """The flow process and the conventions of its network.

    `data_at`: native time of the data, 0 here and 1 in SiT. The network is given native time x `time_scale`, and
    predicts the native velocity ("v"), the data ("x0"), the noise ("eps") or the score, -noise/sigma. `shift`:
    resolution shift of times (Esser et al. 2024). `min_snr`, `direction` and `loss_weight` change the loss, see
    `losses`.
    `path` is one of `ldit.diffusion.path`. The data prediction, `shift`, `min_snr` and `direction` are for the linear
    path.
    """

    prediction: Predicted = "v"
    time_scale: float = 1000.0
    data_at: Literal[0, 1] = 0
    shift: float = 1.0
    min_snr: float = 0.0
    direction: float = 0.0
    path: PathName = "linear"
    loss_weight: Literal["none", "velocity", "likelihood"] = "none"

    def __post_init__(self) -> None:
        if self.path not in PATHS:
            raise ValueError(f"path: expected one of {', '.join(PATHS)}, got {self.path!r}")
        if self.loss_weight not in ("none", "velocity", "likelihood"):
            raise ValueError(f"loss_weight: expected none, velocity or likelihood, got {self.loss_weight!r}")
        if self.loss_weight != "none" and not self._of_noise:
            raise ValueError(f"loss_weight: is for predictions of eps and score, not {self.prediction}")
        if self.path != "linear" and (self.prediction == "x0" or self.shift != 1.0):
            raise ValueError(f"prediction x0 and shift are for the linear path, not {self.path}")
        if (self.min_snr or self.direction) and (self.path != "linear" or self._of_noise):
            raise ValueError("min_snr and direction are for velocity or data on the linear path")

    @property
    def _path(self) -> Path:
        return PATHS[self.path]

    @property
    def _of_noise(self) -> bool:
        return self.prediction in ("eps", "score")

    @property
    def _times(self) -> tuple[float, float]:
        """The least and the largest t. Where alpha is 0, a prediction of the noise says nothing about the data."""
        if self._of_noise and self._path.ends_in_noise:
            return NOISE_EDGE, 1.0 - NOISE_EDGE
        return self._path.least_time, 1.0

    @property
    def least_noise_time(self) -> float:
        """0: a flow has levels arbitrarily close to the data."""
        return 0.0

    def draw_times(self, generators: Sequence[torch.Generator], config: ObjectiveConfig) -> Tensor:
        """Logit-normal, t = sigmoid(mean + std·normal) (Esser et al. 2024), or uniform; then the resolution shift."""
        least, most = self._times
        if config.times == "uniform":
            t = least + (most - least) * torch.cat([torch.rand((1,), generator=one) for one in generators])
        else:
            normal = torch.cat([torch.randn((1,), generator=one) for one in generators])
            t = torch.sigmoid(config.time_mean + config.time_std * normal)
        return (self.shift * t / (1.0 + (self.shift - 1.0) * t)).clamp(least, most)

    def times_at(self, share: Tensor) -> Tensor:
        """The share itself, where all times are trained."""
        least, most = self._times
        return least + (most - least) * share

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
        """alpha·x0 + sigma·noise."""
        alpha, sigma = self._path.coefficients(_per_row(t, x0))
        return alpha * x0 + sigma * noise

    def velocity(self, out: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """dx/dt (noise - x0 on the linear path) from a prediction of v or x0; of 2C channels (SiT) only the first C are
        used. ValueError for other predictions."""
        if self._of_noise:
            raise ValueError(f"velocity: the network predicts {self.prediction}")
        out = out[:, : x_t.shape[1]]
        if self.prediction == "x0":
            return (x_t - out) / _per_row(t, x_t).clamp(min=LEAST_TIME)
        return out if self.data_at == 0 else -out

    def losses(self, predict: Predict, x0: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Squared error of the velocity, or of the noise where that or the score is predicted, per sample: {"loss",
        "mse"}, each (B,).

        With `min_snr` gamma the error counts min(SNR, gamma)·t² in the loss, so that the squared error of the data
        counts min(SNR, gamma) (Hang et al. 2023). With `direction` w the loss has w·(1 - cos) besides, of predicted and
        true velocity over the channels of each place, logged as "direction" (Yao et al. 2025). With `loss_weight` the
        error of the noise counts (d/sigma)² ("velocity") or d/sigma² ("likelihood"), where d = sigma·sigma' -
        sigma²·alpha'/alpha (SiT, its loss_weight).

        x0, noise (B, C, H, W) fp32; t (B,) in [0, 1]; `predict` is given x_t and `network_time(t)`.
        """
        x_t = self.q_sample(x0, t, noise)
        out = output_of(predict(x_t, self.network_time(t)))
        if self._of_noise:
            mse = per_sample((self._noise(out, x_t, t) - noise).square())
            return {"loss": mse * self._weight(t), "mse": mse}
        # For t below LEAST_TIME the target is scaled as the estimate is, so that a perfect x0 still has zero loss.
        of_data = self.prediction == "x0"
        target = self.velocity(x0, x_t, t) if of_data else self._path.velocity(x0, noise, _per_row(t, x0))
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

    def _noise(self, out: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise from a prediction of itself or of the score."""
        out = out[:, : x_t.shape[1]]
        return out if self.prediction == "eps" else -self._path.coefficients(_per_row(t, x_t))[1] * out

    def _weight(self, t: Tensor) -> Tensor:
        """SiT's weight (B,) of the squared error of the noise."""
        if self.loss_weight == "none":
            return torch.ones_like(t)
        (alpha, sigma), (alpha_rate, sigma_rate) = self._path.coefficients(t), self._path.rates(t)
        d = sigma * sigma_rate - sigma.square() * alpha_rate / alpha
        return (d / sigma).square() if self.loss_weight == "velocity" else d / sigma.square()

    def heldout_error(self, losses: dict[str, Tensor], t: Tensor) -> Tensor:
        """Squared error (B,) of eps, x_t + (1-t)·v on the linear path, comparable across processes."""
        return losses["mse"] if self._of_noise else self._path.terms(t).eps_of_v.square() * losses["mse"]

    def level(self, noise_time: float) -> Level:
        """The level at t, on the linear path alpha = 1 - t, sigma = t; the noisiest where t is beyond it."""
        t = min(noise_time, self._times[1])
        alpha, sigma = self._path.coefficients(torch.tensor(t, dtype=torch.float64, device="cpu"))
        return Level(float(alpha), float(sigma), (t if self.data_at == 0 else 1.0 - t) * self.time_scale, t)

    def level_of_ratio(self, ratio: float) -> Level:
        """t = ratio / (1 + ratio) on the linear path."""
        return self.level(self._path.time_of_ratio(ratio))

    def own_grid(self, steps: str) -> list[Level]:
        """Uniform in t from 1, or the largest t there is, to 0; then shifted."""
        if not steps.isdecimal() or not 1 <= int(steps) <= MOST_STEPS:
            raise ValueError(f"expected a number from 1 to {MOST_STEPS}, got {steps!r}")
        count, most = int(steps), self._times[1]
        return [self.level(most * shifted((count - i) / count, self.shift)) for i in range(count)] + [CLEAN]

    def denoised(self, out: Tensor, x: Tensor, level: Level) -> Denoised:
        """x0 and eps from the first C channels, which predict x0, eps, the score or the velocity."""
        out = out[:, : x.shape[1]]
        if self.prediction == "x0":
            return Denoised(out, (x - level.alpha * out) / level.sigma)
        if self._of_noise:
            eps = out if self.prediction == "eps" else -level.sigma * out
            return Denoised((x - level.sigma * eps) / level.alpha, eps)
        velocity = out if self.data_at == 0 else -out
        return Denoised(*self._path.estimates(velocity, x, level.noise_time))


def shifted(u: float, k: float) -> float:
    """k·u/(1 + (k-1)·u), noisier for k > 1. This form gives exactly 1 for u = 1, never a level beyond pure noise."""
    return k * u / (k * u + (1.0 - u))


def _per_row(t: Tensor, like: Tensor) -> Tensor:
    """t (B,) in a shape that multiplies `like` (B, C, H, W) row by row."""
    return t.view(-1, *[1] * (like.ndim - 1))
