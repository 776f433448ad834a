"""The config.json of a KL autoencoder in diffusers' layout, read and checked without diffusers."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ldit.config.serial import from_dict, show
from ldit.errors import CodecError, ConfigError
from ldit.storage.strange import damaged

CLASS_NAME = "AutoencoderKL"
CONFIG = "config.json"

_BLOCKS = {
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
}
_ACTIVATIONS = ("silu", "swish", "mish", "gelu", "relu")
_MAX_BLOCKS = 11  # a factor of 1024, the largest that a model's configuration allows
_LEAST = 1e-30  # smallest size of a divisor
_RANGES = {"layers_per_block": 16, "latent_channels": 1024, "norm_num_groups": 8192}
_MAX_WIDTH = 8192
MAX_BYTES = 1 << 20
_SCALING_FACTOR = 0.18215  # diffusers' default
Scaling = tuple[float | tuple[float, ...], float | tuple[float, ...]]


@dataclass(frozen=True)
class KLConfig:
    """The arguments of diffusers' AutoencoderKL, with its names and defaults.

    Only a missing scaling factor differs: it is None here, and 0.18215 in diffusers.
    """

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    sample_size: int | tuple[int, ...] = 32
    scaling_factor: float | None = None
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True

    @property
    def factor(self) -> int:
        """Pixels a latent pixel, along a side: every block but the last halves the image."""
        return 1 << (len(self.block_out_channels) - 1)

    @property
    def scaling(self) -> Scaling:
        """(scale, shift) of z = (raw - shift)·scale as the folder has them, each a number or one a channel."""
        scale = _SCALING_FACTOR if self.scaling_factor is None else self.scaling_factor
        if self.latents_mean is not None and self.latents_std is not None:
            return tuple(scale / std for std in self.latents_std), self.latents_mean
        return scale, self.shift_factor or 0.0

    def function(self) -> dict[str, Any]:
        """The arguments that change what the network computes: all but sample size, scaling and precision."""
        return {key: value for key, value in asdict(self).items() if key not in _NO_FUNCTION}


_NO_FUNCTION = ("sample_size", "scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast")


def kl_config(data: Any, where: str = CONFIG) -> KLConfig:
    """The checked content `data` of a config.json. Keys that start with "_" are ignored.

    CodecError names `where` and the key that is unknown, of a wrong type, not supported or out of bounds.
    """
    if not isinstance(data, dict):
        raise CodecError(f"{where}: expected an object")
    if data.get("_class_name") != CLASS_NAME:
        raise CodecError(f"{where}: _class_name: expected {CLASS_NAME}, got {show(data.get('_class_name'))}")
    try:
        config = from_dict(KLConfig, {key: value for key, value in data.items() if not key.startswith("_")})
    except ConfigError as error:
        raise CodecError(f"{where}: {error}") from None
    problem = _shape_problem(config) or _value_problem(config)
    if problem:
        raise CodecError(f"{where}: {problem}")
    return config


def read_kl_config(folder: Path) -> KLConfig:
    """`kl_config` of a folder's config.json; CodecError names the file."""
    path = folder / CONFIG
    try:
        if path.stat().st_size > MAX_BYTES:
            raise CodecError(f"{path} is too large for a configuration")
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CodecError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CodecError(damaged(path, error)) from None
    return kl_config(data, str(path))


def diffusers_arguments(config: KLConfig) -> dict[str, Any]:
    """Arguments of diffusers' constructor."""
    arguments = {field.name: getattr(config, field.name) for field in fields(config)}
    if config.scaling_factor is None:
        arguments["scaling_factor"] = _SCALING_FACTOR
    return arguments


def _shape_problem(config: KLConfig) -> str | None:
    """What is wrong with the sizes of the network, naming the key; None if nothing is."""
    # Sizes within bounds.
    widths = config.block_out_channels
    if not 1 <= len(widths) <= _MAX_BLOCKS:
        return f"block_out_channels: must be 1 to {_MAX_BLOCKS} blocks, got {len(widths)}"
    for key, largest in _RANGES.items():
        if not 1 <= getattr(config, key) <= largest:
            return f"{key}: must be 1 to {largest}, got {show(getattr(config, key))}"
    # Group norms must divide every width, and images are RGB.
    for width in widths:
        if not 1 <= width <= _MAX_WIDTH:
            return f"block_out_channels: must be 1 to {_MAX_WIDTH}, got {show(width)}"
        if width % config.norm_num_groups:
            return f"norm_num_groups: {config.norm_num_groups} groups do not divide {width} channels"
    for key in ("in_channels", "out_channels"):
        if getattr(config, key) != 3:
            return f"{key}: images have 3 channels, got {show(getattr(config, key))}"
    # A kind of block for every width.
    for key, known in _BLOCKS.items():
        kinds = getattr(config, key)
        if len(kinds) != len(widths):
            return f"{key}: {len(kinds)} for {len(widths)} block_out_channels"
        for kind in kinds:
            if kind not in known:
                return f"{key}: expected {' or '.join(known)}, got {show(kind)}"
    return None


def _value_problem(config: KLConfig) -> str | None:
    """What is wrong with the other values, naming the key; None if nothing is."""
    if config.act_fn not in _ACTIVATIONS:
        return f"act_fn: expected one of {', '.join(_ACTIVATIONS)}, got {show(config.act_fn)}"
    sizes = config.sample_size if isinstance(config.sample_size, tuple) else (config.sample_size,)
    if len(sizes) not in (1, 2) or not all(1 <= size <= 1 << 16 for size in sizes):
        return f"sample_size: expected one or two sizes up to {1 << 16}, got {show(config.sample_size)}"
    for key in ("scaling_factor", "latents_std"):
        if any(abs(value) < _LEAST for value in _numbers(getattr(config, key))):
            return f"{key}: must not be 0, got {show(getattr(config, key))}"
    for key in ("latents_mean", "latents_std"):
        values = getattr(config, key)
        if values is not None and len(values) != config.latent_channels:
            return f"{key}: {len(values)} values for {config.latent_channels} latent_channels"
    return None


def _numbers(value: float | tuple[float, ...] | None) -> tuple[float, ...]:
    if value is None:
        return ()
    return value if isinstance(value, tuple) else (value,)
