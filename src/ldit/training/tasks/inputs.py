"""Turns what the loader reads into latents: pixels, cached latents, or images encoded on the fly; and their noise."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ldit.codecs.codec import Autoencoder, Codec, open_autoencoder, open_codec
from ldit.codecs.latents import draw, scaled
from ldit.config.run import RunConfig
from ldit.config.spec import AutoencoderConfig
from ldit.data.batch import Batch
from ldit.data.latent_cache.description import CROP, CacheDescription
from ldit.data.samples import Samples
from ldit.errors import CodecError, ConfigError
from ldit.log import logger
from ldit.precision import DTYPES
from ldit.rng import generator, normal


class Inputs(Protocol):
    """Latents of a batch."""

    def __call__(self, batch: Batch, device: torch.device, size: int | None = None) -> Tensor:
        """(B, C, h, w) fp32 on `device`, scaled as the network takes them; no gradients. With `size` those of images
        that were averaged down to this side."""
        ...


class PlainInputs:
    """The batch holds the network's inputs already: pixels."""

    def __call__(self, batch: Batch, device: torch.device, size: int | None = None) -> Tensor:
        return reduced(to_device(batch.inputs, device), size)


class CachedInputs:
    """The batch holds means and log-variances of latents. Every epoch draws new latents, with noise by
    (seed, position)."""

    def __init__(self, config: AutoencoderConfig, seed: int) -> None:
        self.config, self.seed = config, seed

    def __call__(self, batch: Batch, device: torch.device, size: int | None = None) -> Tensor:
        assert size is None, "latents have one size"
        mean, logvar = to_device(batch.inputs, device).chunk(2, dim=1)  # (B, 2C, h, w) -> (B, C, h, w) each
        return self.drawn(batch, mean, logvar)

    def drawn(self, batch: Batch, mean: Tensor, logvar: Tensor) -> Tensor:
        """Scaled latents from moments (B, C, h, w) each."""
        shape = tuple(mean.shape[1:])
        noise = torch.stack([normal(shape, self.seed, "posterior", 0, position) for position in batch.positions])
        return scaled(draw(mean, logvar, to_device(noise, mean.device)), self.config)


class EncodedInputs(CachedInputs):
    """The batch holds images, which are encoded here. With `tf32` products of an fp32 autoencoder are rounded on GPUs:
    in full precision it would take longer than the training step of a network of 600M parameters."""

    def __init__(self, codec: Autoencoder, seed: int, tf32: bool = False) -> None:
        super().__init__(codec.config, seed)
        self.codec, self.tf32 = codec, tf32

    def __call__(self, batch: Batch, device: torch.device, size: int | None = None) -> Tensor:
        images = reduced(to_device(batch.inputs, device), size)
        return self.drawn(batch, *self.codec.moments(images, tf32=self.tf32))


def reduced(images: Tensor, size: int | None) -> Tensor:
    """Images (B, C, S, S) averaged over squares to a side of `size`, which divides S; None: as they are."""
    return images if size is None else F.avg_pool2d(images, images.shape[-1] // size)


def open_inputs(config: RunConfig, data: Samples, device: torch.device) -> tuple[Inputs, Codec | None]:
    """How samples of `data` become inputs of the network, and the run's codec on this rank's device. A latent cache
    needs no codec, but a codec other than the one that encoded it is refused. ConfigError, DataError or CodecError when
    codec, data and model do not fit."""
    # Pixel models.
    if not isinstance(config.codec, AutoencoderConfig):
        if data.cache is not None:
            raise ConfigError(f"data.path: {data.root} holds latents, this model takes pixels (codec.kind)")
        return PlainInputs(), open_codec(config.codec)
    # Latent models: from a cache, or from images.
    codec = _autoencoder(config, config.codec, data, device)
    if data.cache is not None:
        for key, given in (("stages", config.stages), ("cascade.size", config.cascade.size)):
            if given:
                raise ConfigError(f"{key}: the latents of {data.root} have one size; train on the images")
        _check_cache(config, config.codec, data.root, data.cache, codec)
        return CachedInputs(config.codec, config.train.seed), codec
    assert codec is not None
    logger.info(
        "every step encodes its images: `ldit encode` does that once for all epochs, and data.path then names its cache"
    )
    return EncodedInputs(codec, config.train.seed, config.train.precision != "fp32"), codec


def _autoencoder(
    config: RunConfig, codec: AutoencoderConfig, data: Samples, device: torch.device
) -> Autoencoder | None:
    """The run's autoencoder; None if it was not found and the latents are cached. A broken one is always an error."""
    from ldit.codecs.open import find_codec

    try:
        return open_autoencoder(
            codec, (), device, DTYPES[config.data.codec_precision], config.model.in_channels, training=True
        )
    except CodecError:
        if data.cache is None or find_codec(codec.name) is not None:
            raise
        return None


def _check_cache(
    config: RunConfig, codec: AutoencoderConfig, root: Path, cache: CacheDescription, autoencoder: Autoencoder | None
) -> None:
    """ConfigError or DataError when the run's codec is not the one that made the cache. If the codec was not found, its
    name is compared in place of the fingerprint."""
    record = cache.codec
    for key, cached, configured in (
        ("codec.factor", record.factor, codec.factor),
        ("model.in_channels", record.channels, config.model.in_channels),
    ):
        if cached != configured:
            raise ConfigError(f"{key}: {configured}, the latents of {root} have {cached}")
    fingerprint = None if autoencoder is None else autoencoder.fingerprint()
    if fingerprint is None:
        if Path(record.name).name != Path(codec.name).name:
            raise ConfigError(f"codec.name: {codec.name} was not found, and {root} was made with {record.name}")
        logger.warning("the autoencoder %s was not found: that of %s is compared by name only", codec.name, root)
        for name in ("scale", "shift"):
            used, own = getattr(codec, name), getattr(record, name)
            if used != own:
                logger.warning("codec.%s: %s, that of the autoencoder of %s was %s", name, used, root, own)
    cache.check(root, fingerprint, config.data.image_size, CROP)


def training_noise(x0: Tensor, positions: Sequence[int], seed: int, stream: str, draws: int = 1) -> Tensor:
    """Noise (B, C, H, W) on the device of x0 (B, C, H, W), by (seed, stream, position) alone.

    Of several draws each sample gets the one with the smallest Euclidean distance to it, so that paths from noise to
    data cross less.
    """
    shape = tuple(x0.shape[1:])
    if draws == 1:
        return to_device(torch.stack([normal(shape, seed, stream, 0, position) for position in positions]), x0.device)
    drawn = [torch.randn((draws, *shape), generator=generator(seed, stream, 0, position)) for position in positions]
    noises = to_device(torch.stack(drawn), x0.device)  # (B, draws, C, H, W)
    nearest = (noises - x0[:, None]).square().flatten(2).sum(2).argmin(1)  # (B,), on the device
    return noises[torch.arange(len(x0), device=x0.device), nearest]


def to_device(value: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to the device without making the host wait."""
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)
