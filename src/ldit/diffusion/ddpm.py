"""DDPM with learned-range variance: Ho et al. 2020, Nichol & Dhariwal 2021, as DiT and Large-DiT train it.

The only file that knows DDPM indices. Tables are computed in float64 and read as fp32.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldit.config.sections import ObjectiveConfig
from ldit.diffusion.process import CLEAN, Denoised, Level, Predict, output_of, per_sample
from ldit.diffusion.schedule import Tables, respace, tables

TRAIN_STEPS = 1000


class Posterior(NamedTuple):
    """p(x_{t-1} | x_t) as a network predicts it, each (B, C, H, W)."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    pred_xstart: Tensor


@dataclass(frozen=True)
class DDPM:
    """The discrete process with `steps` training steps, of which `kept` are used (all by default).

    Times t are indices into the kept steps. The network gets the original index `kept[t]`. `min_snr` weighs the loss,
    see `losses`.
    """

    steps: int = TRAIN_STEPS
    kept: tuple[int, ...] | None = None
    min_snr: float = 0.0
    tables: Tables = field(init=False, repr=False, compare=False)
    _ready: dict[tuple[str, torch.device], Tensor] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.kept is None:
            object.__setattr__(self, "kept", tuple(range(self.steps)))
        object.__setattr__(self, "tables", tables(self.steps, self.timestep_map))

    @classmethod
    def respaced(cls, sections: str | int, steps: int = TRAIN_STEPS) -> "DDPM":
        """From the original's strings: "250", "10,15,20", "ddim50"; see `respace`."""
        return cls(steps, respace(steps, str(sections)))

    @property
    def timestep_map(self) -> tuple[int, ...]:
        """Original index of each kept step."""
        assert self.kept is not None
        return self.kept

    @property
    def least_noise_time(self) -> float:
        """That of index 0."""
        return 1.0 / self.steps

    def draw_times(self, generators: Sequence[torch.Generator], config: ObjectiveConfig) -> Tensor:
        """Uniform indices; `config` holds settings of flow models alone."""
        return self.times_at(torch.tensor([torch.rand((), generator=one).item() for one in generators]))

    def times_at(self, share: Tensor) -> Tensor:
        """Indices 0 … steps-1, one for each share."""
        return (share * self.steps).long().clamp(max=self.steps - 1)

    def noise_times(self, t: Tensor) -> Tensor:
        """(index + 1) / steps."""
        return (t + 1) / self.steps

    def network_time(self, t: Tensor) -> Tensor:
        """Original indices (B,) of kept indices t."""
        return self._table("map", t.device)[t]

    def noise_time_of(self, network_time: float) -> float:
        """(index + 1) / steps, as the network is given the index."""
        return (network_time + 1.0) / self.steps

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t = sqrt(a_t)·x0 + sqrt(1-a_t)·noise."""
        return self._at("signal", t, x0) * x0 + self._at("noise", t, x0) * noise

    def posterior_mean(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Mean of q(x_{t-1} | x_t, x0)."""
        return self._at("coef1", t, x0) * x0 + self._at("coef2", t, x0) * x_t

    def posterior(self, out: Tensor, x_t: Tensor, t: Tensor) -> Posterior:
        """p(x_{t-1} | x_t) from the network's output (B, 2C or C, H, W); C channels get the fixed large variance."""
        eps, v = _split(out, x_t.shape[1])
        # x0 = sqrt(1/a)·x_t - sqrt(1/a - 1)·eps
        x0 = self._at("recip", t, x_t) * x_t - self._at("recip_noise", t, x_t) * eps
        if v is None:
            log_variance = self._at("log_large", t, x_t).expand_as(x_t)
        else:
            # v in [-1, 1] interpolates the log-variance between its two bounds (Nichol & Dhariwal 2021, eq. 15).
            low = self._at("log_small", t, x_t)
            high = self._at("log_betas", t, x_t)
            fraction = (v + 1) / 2
            log_variance = fraction * high + (1 - fraction) * low
        return Posterior(self.posterior_mean(x0, x_t, t), log_variance.exp(), log_variance, x0)

    def _at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """Table `name` at t, fp32 (B, 1, 1, 1) on the device of `like`."""
        return self._table(name, like.device)[t.to(like.device)].view(-1, *[1] * (like.ndim - 1))

    def _table(self, name: str, device: torch.device) -> Tensor:
        """A table on `device`, copied there once: a copy in every step would make the host wait for the GPU."""
        key = (name, device)
        if key not in self._ready:
            with torch.inference_mode(False):  # autograd refuses tensors that were made in inference mode
                if name == "map":
                    self._ready[key] = torch.tensor(self.timestep_map, device=device)
                else:
                    self._ready[key] = torch.from_numpy(_TABLES[name](self.tables)).float().to(device)
        return self._ready[key]

    def losses(self, predict: Predict, x0: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Per-sample losses {"loss", "mse", "vb"}, each (B,), with loss = mse + vb.

        With `min_snr` gamma, mse counts min(SNR, gamma)/SNR in the loss (Hang et al. 2023).

        x0, noise (B, C, H, W) fp32; t (B,) kept indices; `predict` is given x_t and the original indices.
        """
        # The network predicts the noise of x_t.
        x_t = self.q_sample(x0, t, noise)
        out = output_of(predict(x_t, self.network_time(t)))
        eps, v = _split(out, x0.shape[1])
        mse = per_sample((eps - noise).square())
        weighted = mse * self._min_snr_weight(t.to(mse.device)) if self.min_snr else mse
        if v is None:
            return {"loss": weighted, "mse": mse, "vb": torch.zeros_like(mse)}
        # The variational bound trains the variance only, so its eps is detached (Nichol & Dhariwal 2021).
        vb = self._variational_bound(torch.cat([eps.detach(), v], dim=1), x0, x_t, t)
        return {"loss": weighted + vb, "mse": mse, "vb": vb}

    def _min_snr_weight(self, t: Tensor) -> Tensor:
        """min(SNR, gamma)/SNR at t (B,)."""
        snr = (self._table("signal", t.device)[t] / self._table("noise", t.device)[t]).square()
        return snr.clamp(max=self.min_snr) / snr

    def heldout_error(self, losses: dict[str, Tensor], t: Tensor) -> Tensor:
        """Squared error of eps (B,), comparable across processes."""
        return losses["mse"]

    def level(self, noise_time: float) -> Level:
        """The level at a noise time; between indices log(alpha/sigma) is interpolated linearly."""
        index = min(max(noise_time * self.steps - 1.0, 0.0), self.steps - 1.0)
        ratio = math.exp(float(np.interp(index, np.arange(self.steps), self._half_logsnr)))
        return Level(ratio / math.hypot(1.0, ratio), 1.0 / math.hypot(1.0, ratio), index, (index + 1.0) / self.steps)

    def level_of_ratio(self, ratio: float) -> Level:
        """The level of sigma/alpha = ratio; between indices log(alpha/sigma) is interpolated linearly."""
        rising = self._half_logsnr[::-1]
        # np.interp needs rising places, so it counts from the noisiest index.
        index = self.steps - 1.0 - float(np.interp(-math.log(ratio), rising, np.arange(self.steps)))
        return self.level((index + 1.0) / self.steps)

    @cached_property
    def _half_logsnr(self) -> np.ndarray:
        """log(alpha/sigma) of every index; it falls with the index."""
        cumprod = self.tables.alphas_cumprod
        return np.asarray(0.5 * np.log(cumprod / (1.0 - cumprod)))

    def own_grid(self, steps: str) -> list[Level]:
        """The kept steps of a respacing string as levels. "1" keeps the noisiest index, where the original fails."""
        process = DDPM(self.steps, (self.steps - 1,)) if steps == "1" else DDPM.respaced(steps, self.steps)
        levels = [
            Level(math.sqrt(a), math.sqrt(1.0 - a), float(index), (index + 1) / self.steps)
            for a, index in zip(process.tables.alphas_cumprod.tolist(), process.timestep_map, strict=True)
        ]
        return [*reversed(levels), CLEAN]

    def denoised(self, out: Tensor, x: Tensor, level: Level) -> Denoised:
        """The network predicts eps and, with 2C channels, where the log-variance is between its bounds."""
        channels = x.shape[1]
        eps = out[:, :channels]
        # sqrt(1/a)·x - sqrt(1/a - 1)·eps
        x0 = x * (1.0 / level.alpha) - eps * (level.sigma / level.alpha)
        return Denoised(x0, eps, out[:, channels:] if out.shape[1] == 2 * channels else None)

    def _variational_bound(self, out: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The variational bound (B,) in bits per value.

        It is KL(q(x_{t-1}|x_t,x0) || p), and at t=0 the negative log-likelihood of x0 in 256 bins.
        """
        # The KL divergence between the true posterior and the network's, both Gaussians.
        mean, _, log_variance, _ = self.posterior(out, x_t, t)
        true_mean = self.posterior_mean(x0, x_t, t)
        true_log = self._at("log_small", t, x0)
        kl = 0.5 * (
            -1.0
            + log_variance
            - true_log
            + (true_log - log_variance).exp()
            + (true_mean - mean).square() * (-log_variance).exp()
        )
        # At t=0 there is no earlier step: how likely the data is.
        nll = -_discretised_log_likelihood(x0, mean, 0.5 * log_variance)
        return torch.where(t == 0, per_sample(nll), per_sample(kl)) / math.log(2.0)


def _split(out: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    if out.shape[1] == channels:
        return out, None
    if out.shape[1] != 2 * channels:
        raise ValueError(f"network output has {out.shape[1]} channels, expected {channels} or {2 * channels}")
    eps, v = out.chunk(2, dim=1)
    return eps, v


# Tables by name, float64, one entry a kept step.
_TABLES: dict[str, Callable[[Tables], np.ndarray]] = {
    "signal": lambda t: np.sqrt(t.alphas_cumprod),
    "noise": lambda t: np.sqrt(1.0 - t.alphas_cumprod),
    "recip": lambda t: np.sqrt(1.0 / t.alphas_cumprod),
    "recip_noise": lambda t: np.sqrt(1.0 / t.alphas_cumprod - 1.0),
    "coef1": lambda t: t.posterior_mean_coef1,
    "coef2": lambda t: t.posterior_mean_coef2,
    "log_small": lambda t: t.posterior_log_variance_clipped,
    "log_betas": lambda t: np.log(t.betas),
    "log_large": lambda t: np.log(np.append(t.posterior_variance[1:2], t.betas[1:])),
}


def _discretised_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log-probability that a Gaussian gives to the bin x ± 1/255; the outermost bins reach to infinity."""
    centred, inverse = x - mean, (-log_scale).exp()
    upper = _normal_cdf(inverse * (centred + 1.0 / 255.0))
    lower = _normal_cdf(inverse * (centred - 1.0 / 255.0))
    inside = (upper - lower).clamp(min=1e-12).log()
    first, last = upper.clamp(min=1e-12).log(), (1.0 - lower).clamp(min=1e-12).log()
    return torch.where(x < -0.999, first, torch.where(x > 0.999, last, inside))


def _normal_cdf(z: Tensor) -> Tensor:
    """Tanh approximation of the normal distribution: ½(1 + tanh(sqrt(2/π)·(z + 0.044715 z³)))."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * z.pow(3))))
