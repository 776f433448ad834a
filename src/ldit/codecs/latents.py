"""Raw latents, as an autoencoder knows them, and scaled ones, as the diffusion knows them. Pure tensors."""

import torch
from torch import Tensor

from ldit.config.spec import AutoencoderConfig

LOGVAR_RANGE = (-30.0, 20.0)
"""A posterior's log-variance is clamped to this, as latent diffusion and its children do."""


def scaled(raw: Tensor, config: AutoencoderConfig) -> Tensor:
    """Raw latents (B, C, h, w) -> z = (raw - shift)·scale, numbers or one a channel."""
    return (raw - _per_channel(config.shift, raw)) * _per_channel(config.scale, raw)


def unscaled(z: Tensor, config: AutoencoderConfig) -> Tensor:
    """Scaled latents (B, C, h, w) -> raw = z / scale + shift."""
    return z / _per_channel(config.scale, z) + _per_channel(config.shift, z)


def draw(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """A raw sample of the posterior, all (B, C, h, w): mean + exp(logvar / 2)·noise, the log-variance clamped."""
    return mean + torch.exp(0.5 * logvar.clamp(*LOGVAR_RANGE)) * noise


def _per_channel(value: float | tuple[float, ...], like: Tensor) -> float | Tensor:
    """A number as it is; one a channel as (C, 1, 1)."""
    if isinstance(value, tuple):
        return torch.tensor(value, dtype=like.dtype, device=like.device).view(-1, 1, 1)
    return value
