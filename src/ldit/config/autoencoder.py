"""Autoencoders that `ldit train` trains: network, run, and the content of their config.json."""

from dataclasses import dataclass, field
from typing import Any, Literal

from ldit.config.run import BaseRun, check_format, check_idle, model_kind
from ldit.config.sections import TrainConfig
from ldit.config.serial import from_dict, show, to_dict
from ldit.config.spec import FORMAT
from ldit.errors import ConfigError

AUTOENCODER = "autoencoder"


@dataclass(frozen=True)
class AutoencoderModelConfig:
    """A KL autoencoder (Rombach et al. 2022), the network of diffusers' AutoencoderKL: every level but the last halves
    height and width."""

    kind: Literal["autoencoder"] = field(default="autoencoder", kw_only=True)
    latent_channels: int = 4
    """Number of latent channels."""
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    """Channels of each level, from the image to the latent."""
    layers_per_block: int = 2
    """Residual blocks per level."""
    norm_num_groups: int = 32
    """Groups of the group norms; divides the channels of every level."""
    mid_block_attention: bool = True
    """Self-attention at the lowest resolution, in encoder and decoder."""

    def __post_init__(self) -> None:
        for key, most in (("latent_channels", 1024), ("layers_per_block", 16), ("norm_num_groups", 4096)):
            if not 1 <= getattr(self, key) <= most:
                raise ConfigError(f"model.{key}: must be 1 to {most}, got {show(getattr(self, key))}")
        if not 1 <= len(self.block_out_channels) <= 8:
            raise ConfigError(f"model.block_out_channels: 1 to 8 levels, got {len(self.block_out_channels)}")
        for width in self.block_out_channels:
            if not 1 <= width <= 8192 or width % self.norm_num_groups:
                raise ConfigError(
                    f"model.block_out_channels: {show(width)} is not a multiple of norm_num_groups "
                    f"{self.norm_num_groups} up to 8192"
                )

    @property
    def factor(self) -> int:
        """Side of an image over the side of its latent."""
        return 1 << (len(self.block_out_channels) - 1)

    def to_diffusers(self) -> dict[str, Any]:
        """The content of diffusers' config.json, without scales."""
        levels = len(self.block_out_channels)
        return {
            "_class_name": "AutoencoderKL",
            "in_channels": 3,
            "out_channels": 3,
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "block_out_channels": list(self.block_out_channels),
            "layers_per_block": self.layers_per_block,
            "act_fn": "silu",
            "latent_channels": self.latent_channels,
            "norm_num_groups": self.norm_num_groups,
            "mid_block_add_attention": self.mid_block_attention,
        }


@dataclass(frozen=True)
class AutoencoderObjectiveConfig:
    """Mean absolute error of the images, plus the KL divergence of the latents from a standard normal."""

    kl_weight: float = 1e-6
    """Weight of the KL divergence, which is summed over a latent, in nats, and divided by the number of values of the
    image."""


# Keys that have no effect in such a run: (key, the only value, why).
_IDLE: tuple[tuple[str, Any, str], ...] = (
    ("train.attention_every", 0, "attention logits are logged for diffusion models only"),
    ("train.init_ema", True, "autoencoders start from fresh weights"),
    ("data.codec_precision", "fp32", "training an autoencoder encodes no images beforehand"),
    ("ema.power", (), "`ldit ema` supports diffusion models only"),
)


@dataclass(frozen=True, kw_only=True)
class AutoencoderRun(BaseRun):
    """The complete configuration of a run that trains an autoencoder, saved as RUN/config.json."""

    model: AutoencoderModelConfig = field(default_factory=AutoencoderModelConfig)
    objective: AutoencoderObjectiveConfig = field(default_factory=AutoencoderObjectiveConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(attention_every=0))

    def check(self) -> None:
        """ConfigError naming the key whose value cannot work, whatever the number of processes."""
        super().check()
        if self.data.image_size < 1 or self.data.image_size % self.model.factor:
            raise ConfigError(
                f"data.image_size: {self.data.image_size} is not a multiple of the autoencoder's factor "
                f"{self.model.factor}"
            )
        if not self.objective.kl_weight >= 0:
            raise ConfigError(f"objective.kl_weight: must not be negative, got {self.objective.kl_weight}")
        for key, plain in (("tp", 1), ("recompute", "none"), ("compile", False)):
            value = getattr(self.parallel, key)
            if value != plain:
                raise ConfigError(f"parallel.{key}: autoencoders are trained with {plain!r}, got {value!r}")
        if self.optim.kind != "adamw":
            raise ConfigError(f"optim.kind: autoencoders are trained with 'adamw', got {self.optim.kind!r}")
        if self.train.init_from:
            raise ConfigError("train.init_from: autoencoders start from fresh weights")
        check_idle(self, _IDLE)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "AutoencoderRun":
        """Strict reader of RUN/config.json."""
        check_format(data)
        return from_dict(cls, {key: value for key, value in data.items() if key != "format"})


@dataclass(frozen=True)
class LatentStatistics:
    """Mean and standard deviation of all values of an autoencoder's latents: its codec's shift and 1/scale."""

    mean: float
    std: float


@dataclass(frozen=True)
class AutoencoderSpec(dict[str, Any]):
    """Everything that an autoencoder's weights need to be used as a codec: the config.json of a step of its run."""

    model: AutoencoderModelConfig
    latents: LatentStatistics | None = None
    training: dict[str, Any] | None = None

    class_names = None

    def __post_init__(self) -> None:
        self.update(self.to_json())

    def to_json(self) -> dict[str, Any]:
        values = {name: to_dict(getattr(self, name)) for name in ("model", "latents", "training")}
        return {"format": FORMAT, **{name: value for name, value in values.items() if value is not None}}

    @classmethod
    def from_json(cls, data: Any, where: str = "config.json") -> "AutoencoderSpec":
        """Strict reader; ConfigError names the key at fault."""
        if not is_autoencoder(data):
            raise ConfigError(f"{where}: not an autoencoder of ours")
        if data.get("format") != FORMAT:
            raise ConfigError(f"{where}: format: expected {FORMAT}, got {show(data.get('format'))}")
        try:
            return from_dict(cls, {key: value for key, value in data.items() if key != "format"})
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None


def is_autoencoder(data: Any) -> bool:
    """Whether this is the content of the config.json of an autoencoder of ours, of a step or a run."""
    return model_kind(data) == AUTOENCODER
