"""From what the loader reads to latents: images are their own, go through an autoencoder, or were encoded before."""

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ldit.codecs.autoencoder import AutoencoderCodec
from ldit.codecs.latents import draw, scaled
from ldit.codecs.open import Codec, find_codec, open_codec
from ldit.codecs.pixels import PixelCodec
from ldit.config.run import RunConfig
from ldit.config.spec import AutoencoderConfig
from ldit.data.batch import Batch
from ldit.data.latent_cache.description import CROP, CacheDescription
from ldit.data.samples import Samples
from ldit.errors import CodecError, ConfigError
from ldit.log import logger
from ldit.precision import DTYPES
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


def open_inputs(config: RunConfig, data: Samples, device: torch.device) -> tuple[Inputs, Codec | None]:
    """How samples of `data` become latents of the run's codec, and the codec on this rank's device. ConfigError,
    DataError or CodecError when codec, data and model do not fit."""
    codec = _codec(config, data, device)
    if data.cache is not None:
        assert isinstance(config.codec, AutoencoderConfig)
        return CachedInputs(config.codec, config.train.seed), codec
    if isinstance(codec, AutoencoderCodec):
        return EncodedInputs(codec, config.train.seed), codec
    return PlainInputs(), codec


def _codec(config: RunConfig, data: Samples, device: torch.device) -> Codec | None:
    """The codec on this process's device. Cached latents do without one, but not with another than made them."""
    if not isinstance(config.codec, AutoencoderConfig):
        if data.cache is not None:
            raise ConfigError(f"data.path: {data.root} holds latents, this model takes pixels (codec.kind)")
        return open_codec(config.codec)
    dtype = DTYPES[config.data.codec_precision]
    try:
        codec = open_codec(config.codec, (), device, dtype, config.model.in_channels)
    except CodecError:
        if data.cache is None or find_codec(config.codec.name) is not None:
            raise  # one that is there and broken is no absent one
        codec = None
    assert not isinstance(codec, PixelCodec)
    if data.cache is not None:
        _check_cache(config, data.root, data.cache, codec)
    return codec


def _check_cache(config: RunConfig, root: Path, cache: CacheDescription, codec: Codec | None) -> None:
    """ConfigError or DataError where the run's codec is not the cache's. Without the codec its name must do."""
    assert isinstance(config.codec, AutoencoderConfig)
    record = cache.codec
    for key, theirs, ours in (
        ("codec.factor", record.factor, config.codec.factor),
        ("model.in_channels", record.channels, config.model.in_channels),
    ):
        if theirs != ours:
            raise ConfigError(f"{key}: {ours}, the latents of {root} have {theirs}")
    fingerprint = codec.fingerprint() if isinstance(codec, AutoencoderCodec) else None
    if fingerprint is None:
        if Path(record.name).name != Path(config.codec.name).name:
            raise ConfigError(f"codec.name: {config.codec.name} is not found, and {root} was made with {record.name}")
        logger.warning("the autoencoder %s is not found: %s is known by that name alone", config.codec.name, root)
        for name in ("scale", "shift"):
            used, own = getattr(config.codec, name), getattr(record, name)
            if used != own:
                logger.warning("codec.%s: %s, that of the autoencoder of %s was %s", name, used, root, own)
    cache.check(root, fingerprint, config.data.image_size, CROP)


def to_device(value: Tensor, device: torch.device) -> Tensor:
    """Move host numbers without making the host wait for the GPU."""
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)
