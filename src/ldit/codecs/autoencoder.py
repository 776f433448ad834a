"""The codec of a frozen KL autoencoder in diffusers' layout: images to posteriors, scaled latents to images."""

import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ldit.codecs.kl_config import CONFIG, KLConfig, Scaling, read_kl_config
from ldit.codecs.kl_weights import fingerprint, read_tensors, weight_files
from ldit.codecs.latents import scaled, unscaled
from ldit.codecs.tiles import Cell, Tiling, apply_tiled
from ldit.config.spec import AutoencoderConfig
from ldit.errors import CodecError, SourceError
from ldit.log import logger
from ldit.precision import products, unrounded
from ldit.storage.tensors import NamedTensors, assign

if TYPE_CHECKING:
    from ldit.codecs.kl_network import KLNetwork

# Pixels in one pass. A decoder of the usual size needs about 4 KB of memory a pixel in fp32.
_PIXELS_CPU = 1 << 18
_PIXELS = 1 << 20


class AutoencoderCodec:
    """The autoencoder in `folder`: `factor` pixels a latent pixel along a side, `channels` channels of a latent.

    Scale and shift are those of `config`, the diffusion model's, not the folder's. Tensors go in and come out in fp32;
    `dtype` is the dtype of the network. On CPUs weights and activations are channels_last: with AVX-512 (torch 2.13,
    one thread, 256 px, 84 million parameters, fp32) encoding took 3.1 s instead of 4.1, decoding 6.9 instead of 9.0.
    On GPUs they are contiguous: CUDA's group norm would copy channels_last ones.
    """

    device: torch.device
    dtype: torch.dtype
    _network: "KLNetwork"
    _wide: "KLNetwork | None" = None
    """The network in fp32, opened when a result does not fit into fp16."""

    def __init__(
        self,
        config: AutoencoderConfig,
        folder: Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """CodecError names the file, and the key or tensor that is missing, unknown, misshapen or does not fit."""
        self.config, self.folder, self.tiling = config, folder, Tiling()
        self.network_config = check_folder(config, folder)
        self.factor, self.channels = self.network_config.factor, self.network_config.latent_channels
        self._fingerprint: str | None = None
        self._widening = threading.Lock()
        self._files = self._state_of_files()
        self._warn_of_scaling()
        self._open(torch.device(device), dtype)

    def moments(self, images: Tensor, tf32: bool = False) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) in [-1, 1] -> mean and log-variance of the raw posterior, each (B, C, H/f, W/f) fp32. With
        `tf32` a GPU may round fp32 products to TF32.

        On the codec's device, without gradients. CodecError unless the sides are multiples of `factor`.
        """
        height, width = images.shape[-2:]
        if images.shape[1] != 3 or not height or not width or height % self.factor or width % self.factor:
            raise CodecError(
                f"the autoencoder {self.config.name!r} takes images of 3 channels with sides that are multiples of "
                f"{self.factor}, got {tuple(images.shape[1:])}"
            )
        mean, logvar = self._through(_encode, images, Cell(self.factor, 1), tf32).chunk(2, dim=1)
        return mean.contiguous(), logvar.contiguous()

    def encode(self, images: Tensor) -> Tensor:
        """Images as for `moments` -> the posterior's mean, scaled: (B, C, H/f, W/f) fp32. No gradients."""
        return scaled(self.moments(images)[0], self.config)

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) -> (B, 3, h·f, w·f), about [-1, 1], fp32 on the codec's device. No gradients."""
        if latents.shape[1] != self.channels:
            raise CodecError(
                f"the autoencoder {self.config.name!r} has latents of {self.channels} channels, got {latents.shape[1]}"
            )
        raw = unscaled(latents.to(self.device, torch.float32), self.config)
        return self._through(_decode, raw, Cell(1, self.factor)).contiguous()

    def fingerprint(self) -> str:
        """Hex sha256 of configuration and weights, the same for any file format; computed at first use."""
        if self._fingerprint is None:
            self._check_files()
            self._fingerprint = fingerprint(self.folder, self.network_config)
        return self._fingerprint

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "AutoencoderCodec":
        """Move the codec. For another dtype the files are read again, so that nothing is rounded twice."""
        if dtype not in (None, self.dtype):
            self._check_files()
            self._open(torch.device(device), dtype)
        elif torch.device(device) != self.device:
            self.device, self._wide = torch.device(device), None
            # diffusers' own method warns about dtypes
            nn.Module.to(self._network, self.device, memory_format=_layout(self.device))  # type: ignore[call-overload]
        return self

    def _through(self, part: "_Part", x: Tensor, cell: Cell, tf32: bool = False) -> Tensor:
        """Run the encoder or decoder; fp32 out.

        Rows that overflow in fp16 are computed again in fp32. So the result of an image depends on that image alone,
        not on earlier ones or on its batch.
        """
        x = x.to(self.device, torch.float32)
        if not len(x):  # not all convolutions take an empty batch
            height, width = (size // cell.input * cell.output for size in x.shape[-2:])
            return x.new_empty(0, 2 * self.channels if part is _encode else 3, height, width)
        out = self._compute(part, self._network, self.dtype, x, cell, tf32)
        if self.dtype is torch.float16:
            # Rows whose input is finite and whose result is not.
            overflowed = x.isfinite().flatten(1).all(1) & ~out.isfinite().flatten(1).all(1)
            if overflowed.any():
                out[overflowed] = self._compute(part, self._widened(), torch.float32, x[overflowed], cell)
        return out

    def _widened(self) -> "KLNetwork":
        """The network in fp32, opened once by the first thread that needs it."""
        with self._widening:
            if self._wide is None:
                logger.warning(
                    "the autoencoder %r overflows in fp16: images whose results are not finite are computed in fp32",
                    self.config.name,
                )
                self._check_files()
                self._wide = self._built(torch.float32)
            return self._wide

    def _compute(
        self, part: "_Part", net: "KLNetwork", dtype: torch.dtype, x: Tensor, cell: Cell, tf32: bool = False
    ) -> Tensor:
        layout = _layout(self.device)

        def network(rows: Tensor) -> Tensor:
            return part(net, rows.to(dtype, memory_format=layout))

        pixels = _PIXELS_CPU if self.device.type == "cpu" else _PIXELS
        # Without TF32: a latent cache may be used on other devices than it was made on, so fp32 is fp32 on all of them.
        with torch.no_grad(), products("tf32") if tf32 else unrounded():
            return apply_tiled(network, x, cell, self.tiling, pixels)

    def _open(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype, self._wide = device, dtype, None
        self.__dict__.pop("_network", None)  # frees the old network before the new one is read
        self._network = self._built(dtype)

    def _built(self, dtype: torch.dtype) -> "KLNetwork":
        from ldit.codecs.kl_network import build_network

        with torch.device("meta"):
            network = build_network(self.network_config, str(self.folder / CONFIG))
        try:
            tensors = _laid_out(read_tensors(self.folder), _layout(self.device))
            assign(network, tensors, str(self.folder), self.device, dtype)
        except SourceError as error:
            raise CodecError(str(error)) from None
        network.eval().requires_grad_(False)
        return network

    def _state_of_files(self) -> list[tuple[str, int, int]]:
        """Name, size and time of every file: they change when a file is written again."""
        try:
            states = [(name, (self.folder / name).stat()) for name in (CONFIG, *weight_files(self.folder))]
        except OSError as error:
            raise CodecError(f"{error.filename}: {error.strerror}") from None
        return [(name, state.st_size, state.st_mtime_ns) for name, state in states]

    def _check_files(self) -> None:
        if self._state_of_files() != self._files:
            raise CodecError(f"the files of the autoencoder {self.folder} changed since it was opened")

    def _warn_of_scaling(self) -> None:
        """Log when the folder has another scale or shift than the model."""
        own, used = self.network_config, (self.config.scale, self.config.shift)
        has_scaling = own.scaling_factor is not None or own.shift_factor is not None or own.latents_mean is not None
        if has_scaling and not _same(own.scaling, used, self.channels):
            logger.warning(
                "%s has scale %s and shift %s; the model's codec.scale %s and codec.shift %s are used",
                self.folder / CONFIG,
                *own.scaling,
                *used,
            )


def _layout(device: torch.device) -> torch.memory_format:
    return torch.contiguous_format if device.type == "cuda" else torch.channels_last


def _laid_out(tensors: NamedTensors, layout: torch.memory_format) -> Iterator[tuple[str, Tensor]]:
    """The tensors one by one, convolution weights in this memory format."""
    for name, tensor in tensors:
        convolution = tensor.layout is torch.strided and tensor.ndim == 4
        yield name, tensor.contiguous(memory_format=layout) if convolution else tensor


_Part = Callable[["KLNetwork", Tensor], Tensor]


def _encode(network: "KLNetwork", images: Tensor) -> Tensor:
    return torch.cat(network.moments(images), dim=1)


def _decode(network: "KLNetwork", raw: Tensor) -> Tensor:
    return network.images(raw)


def check_folder(config: AutoencoderConfig, folder: Path, channels: int | None = None) -> KLConfig:
    """The folder's configuration, checked without reading weights or importing diffusers.

    CodecError if it is damaged, has no weights, or does not fit the model's codec section or latent `channels`.
    """
    own = read_kl_config(folder)
    weight_files(folder)
    if own.factor != config.factor:
        raise CodecError(
            f"{folder}: a latent pixel is {own.factor} pixels wide, the model's codec.factor is {config.factor}"
        )
    if channels not in (None, own.latent_channels):
        raise CodecError(f"{folder}: latents of {own.latent_channels} channels, the model's have {channels}")
    for key, value in (("scale", config.scale), ("shift", config.shift)):
        if isinstance(value, tuple) and len(value) != own.latent_channels:
            raise CodecError(
                f"{folder}: latents of {own.latent_channels} channels, codec.{key} has {len(value)} values"
            )
    if 0 in _per_channel(config.scale, own.latent_channels):
        raise CodecError(f"codec.scale: must not be 0, got {config.scale}")
    return own


def _same(a: Scaling, b: Scaling, channels: int) -> bool:
    pairs = [
        (x, y)
        for m, n in zip(a, b, strict=True)
        for x, y in zip(*(_per_channel(v, channels) for v in (m, n)), strict=True)
    ]
    return all(math.isclose(x, y, rel_tol=1e-6) for x, y in pairs)


def _per_channel(value: float | tuple[float, ...], channels: int) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,) * channels
