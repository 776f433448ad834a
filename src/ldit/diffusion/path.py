"""The path of a flow from data at t = 0 to noise at t = 1: x_t = alpha(t)·x0 + sigma(t)·noise.

The three of SiT (Ma et al. 2024), whose time is 1 - t:

| path   | alpha                                | sigma          |
|--------|--------------------------------------|----------------|
| linear | 1 - t                                | t              |
| gvp    | cos(pi·t/2)                          | sin(pi·t/2)    |
| vp     | exp(-(20 - 0.1)·t²/4 - 0.1·t/2)      | sqrt(1-alpha²) |

The velocity of x_t is alpha'(t)·x0 + sigma'(t)·noise. On vp it is infinite at t = 0, and at t = 1 some data is left.
Times, coefficients and rates are tensors of one shape.
"""

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

_BETA_LEAST, _BETA_MOST = 0.1, 20.0  # of vp, as in Song et al. 2021


class Terms(NamedTuple):
    """x0 = x0_of_x·x + x0_of_v·v and eps = eps_of_x·x + eps_of_v·v, of the velocity v at x."""

    x0_of_x: Tensor
    x0_of_v: Tensor
    eps_of_x: Tensor
    eps_of_v: Tensor


class Path(Protocol):
    @property
    def least_time(self) -> float:
        """The least t of training: SiT's train_eps on vp, where the velocity is infinite at 0."""
        ...

    @property
    def ends_in_noise(self) -> bool:
        """Whether alpha(1) = 0, so that nothing can be said of the data there without a velocity."""
        ...

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma."""
        ...

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha' and sigma'."""
        ...

    def time_of_ratio(self, ratio: float) -> float:
        """t with sigma/alpha = ratio; 1 if none is as noisy."""
        ...

    def terms(self, t: Tensor) -> Terms:
        """How data and noise follow from a velocity."""
        ...

    def velocity(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """alpha'·x0 + sigma'·noise."""
        ...

    def estimates(self, v: Tensor, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """x0 and noise of the velocity v at x, by `terms`."""
        ...


class _Linear:
    least_time, ends_in_noise = 0.0, True

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1.0 - t, t

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.ones_like(t), torch.ones_like(t)

    def time_of_ratio(self, ratio: float) -> float:
        return ratio / (1.0 + ratio) if math.isfinite(ratio) else 1.0

    def terms(self, t: Tensor) -> Terms:
        return Terms(torch.ones_like(t), -t, torch.ones_like(t), 1.0 - t)

    def velocity(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise - x0

    def estimates(self, v: Tensor, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        return x - t * v, x + (1.0 - t) * v


class _Curved:
    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def terms(self, t: Tensor) -> Terms:
        raise NotImplementedError

    def velocity(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        alpha_rate, sigma_rate = self.rates(t)
        return alpha_rate * x0 + sigma_rate * noise

    def estimates(self, v: Tensor, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        of = [float(term) for term in self.terms(torch.tensor(t, dtype=torch.float64, device="cpu"))]
        return of[0] * x + of[1] * v, of[2] * x + of[3] * v


class _GVP(_Curved):
    least_time, ends_in_noise = 0.0, True

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sin(0.5 * math.pi * (1.0 - t)), torch.sin(0.5 * math.pi * t)  # exactly 0 and 1 at the ends

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.coefficients(t)
        return -0.5 * math.pi * sigma, 0.5 * math.pi * alpha

    def time_of_ratio(self, ratio: float) -> float:
        return math.atan(ratio) / (0.5 * math.pi)

    def terms(self, t: Tensor) -> Terms:
        alpha, sigma = self.coefficients(t)
        return Terms(alpha, -2.0 / math.pi * sigma, sigma, 2.0 / math.pi * alpha)


class _VP(_Curved):
    least_time, ends_in_noise = 1e-5, False

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha = -0.25 * (_BETA_MOST - _BETA_LEAST) * t * t - 0.5 * _BETA_LEAST * t
        return torch.exp(log_alpha), torch.sqrt(-torch.expm1(2.0 * log_alpha))

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.coefficients(t)
        return -alpha * self._half_beta(t), alpha.square() * self._half_beta(t) / sigma

    def time_of_ratio(self, ratio: float) -> float:
        # log(1 + ratio²) = -2·log(alpha) = a·t² + b·t.
        if not math.isfinite(ratio):
            return 1.0
        a, b = 0.5 * (_BETA_MOST - _BETA_LEAST), _BETA_LEAST
        c = 2.0 * math.log(math.hypot(1.0, ratio)) if ratio > 1.0 else math.log1p(ratio * ratio)
        return min(2.0 * c / (b + math.sqrt(b * b + 4.0 * a * c)), 1.0)

    def terms(self, t: Tensor) -> Terms:
        # alpha·alpha' = -sigma·sigma', so that sigma', which may be infinite, is not needed.
        (alpha, sigma), half = self.coefficients(t), self._half_beta(t)
        return Terms(alpha, -sigma.square() / (alpha * half), sigma, sigma / half)

    def _half_beta(self, t: Tensor) -> Tensor:
        """-alpha'/alpha."""
        return 0.5 * (_BETA_LEAST + (_BETA_MOST - _BETA_LEAST) * t)


PATHS: dict[str, Path] = {"linear": _Linear(), "gvp": _GVP(), "vp": _VP()}
