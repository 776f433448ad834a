"""The interface of a codec, and opening the codec of a configuration; autoencoders are imported only when needed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ldit.codecs.pixels import PixelCodec
from ldit.config.spec import AutoencoderConfig, CodecConfig


class Codec(Protocol):
    """What turns latents into images and back."""

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> latents (B, C, h, w), scaled as the network takes them."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) -> images (B, 3, H, W) in about [-1, 1]."""
        ...


class Autoencoder(Codec, Protocol):
    """A codec whose encoder gives a posterior, such as `ldit.codecs.autoencoder.AutoencoderCodec`."""

    config: AutoencoderConfig
    factor: int
    """Pixels a latent pixel, along a side."""
    channels: int
    """Channels of a latent."""

    def moments(self, images: Tensor, tf32: bool = False) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of raw latents, each (B, C, h, w) fp32. With `tf32` a GPU may round fp32 products."""
        ...

    def fingerprint(self) -> str:
        """Hex sha256 of the weights and their configuration."""
        ...


def open_codec(
    config: CodecConfig,
    roots: Sequence[Path] = (),
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    channels: int | None = None,
) -> Codec:
    """The codec of `config`: from a local folder (`ldit.codecs.open.find_codec`), else from the Hub.

    CodecError names the places where it was looked for, or what is wrong with the folder. `channels` is the number of
    latent channels that it must have.
    """
    if isinstance(config, AutoencoderConfig):
        return open_autoencoder(config, roots, device, dtype, channels)
    return PixelCodec()


def open_autoencoder(
    config: AutoencoderConfig,
    roots: Sequence[Path] = (),
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    channels: int | None = None,
    training: bool = False,
) -> Autoencoder:
    """As `open_codec`, for an autoencoder. `training`: whether a run asks, which has other flags to name it."""
    from ldit.codecs.autoencoder import AutoencoderCodec, check_folder
    from ldit.codecs.open import SAMPLING_HELP, TRAINING_HELP, codec_folder

    folder = codec_folder(config.name, roots, TRAINING_HELP if training else SAMPLING_HELP)
    check_folder(config, folder, channels)
    return AutoencoderCodec(config, folder, device, dtype)


def check_codec(config: CodecConfig, roots: Sequence[Path] = (), channels: int | None = None) -> None:
    """CodecError if `open_codec` would not find a codec that fits; reads no weights."""
    if isinstance(config, AutoencoderConfig):
        from ldit.codecs.autoencoder import check_folder
        from ldit.codecs.open import codec_folder

        check_folder(config, codec_folder(config.name, roots), channels)
