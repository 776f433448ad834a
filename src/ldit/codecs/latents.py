"""Raw latents of an autoencoder <-> scaled latents of a diffusion model. Pure tensors."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ldit.config.spec import AutoencoderConfig

LOGVAR_RANGE = (-30.0, 20.0)
"""A posterior's log-variance is clamped to this range, as in latent diffusion."""


def scaled(raw: Tensor, config: AutoencoderConfig) -> Tensor:
    """Raw latents (B, C, h, w) -> z = (raw - shift)·scale; scale and shift are numbers or one a channel."""
    return (raw - _per_channel(config.shift, raw)) * _per_channel(config.scale, raw)


def unscaled(z: Tensor, config: AutoencoderConfig) -> Tensor:
    """Scaled latents (B, C, h, w) -> raw = z / scale + shift."""
    return z / _per_channel(config.scale, z) + _per_channel(config.shift, z)


def draw(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """A sample of the posterior, mean + exp(logvar / 2)·noise with clamped logvar; all (B, C, h, w)."""
    return mean + torch.exp(0.5 * logvar.clamp(*LOGVAR_RANGE)) * noise


def _per_channel(value: float | tuple[float, ...], like: Tensor) -> float | Tensor:
    """A single number unchanged; one a channel as a tensor (C, 1, 1)."""
    if isinstance(value, tuple):
        return torch.tensor(value, dtype=like.dtype, device=like.device).view(-1, 1, 1)
    return value


def enlarged(latents: Tensor, size: Sequence[int]) -> Tensor:
    """Latents (B, C, h, w) interpolated to (B, C, *size), as the second stage of a cascade is given them."""
    return F.interpolate(latents, tuple(size), mode="bilinear", align_corners=False)
