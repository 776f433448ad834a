"""From what the loader reads to latents: images are their own, go through an autoencoder, or were encoded before."""

from typing import Protocol

import torch
from torch import Tensor

from ldit.codecs.autoencoder import AutoencoderCodec
from ldit.codecs.latents import draw, scaled
from ldit.config.spec import AutoencoderConfig
from ldit.data.batch import Batch
from ldit.rng import normal


class Inputs(Protocol):
    """Latents of a batch."""

    def __call__(self, batch: Batch, device: torch.device) -> Tensor:
        """(B, C, h, w) fp32 on `device`, scaled as the network takes them; no gradients."""
        ...


class PlainInputs:
    """The batch holds latents already, as pixels are."""

    def __call__(self, batch: Batch, device: torch.device) -> Tensor:
        return to_device(batch.inputs, device)


class CachedInputs:
    """The batch holds means and log-variances: every visit draws a fresh latent, whose noise depends on
    (seed, position) alone."""

    def __init__(self, config: AutoencoderConfig, seed: int) -> None:
        self.config, self.seed = config, seed

    def __call__(self, batch: Batch, device: torch.device) -> Tensor:
        mean, logvar = to_device(batch.inputs, device).chunk(2, dim=1)
        return self.drawn(batch, mean, logvar)

    def drawn(self, batch: Batch, mean: Tensor, logvar: Tensor) -> Tensor:
        """Scaled latents from moments (B, C, h, w) each."""
        shape = tuple(mean.shape[1:])
        noise = torch.stack([normal(shape, self.seed, "posterior", 0, position) for position in batch.positions])
        return scaled(draw(mean, logvar, to_device(noise, mean.device)), self.config)


class EncodedInputs(CachedInputs):
    """The batch holds images, which are encoded now."""

    def __init__(self, codec: AutoencoderCodec, seed: int) -> None:
        super().__init__(codec.config, seed)
        self.codec = codec

    def __call__(self, batch: Batch, device: torch.device) -> Tensor:
        return self.drawn(batch, *self.codec.moments(to_device(batch.inputs, device)))


def to_device(value: Tensor, device: torch.device) -> Tensor:
    """Move host numbers without making the host wait for the GPU."""
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)
