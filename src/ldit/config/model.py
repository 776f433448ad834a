"""Network configurations and the presets table. Torch-free; defaults are the original constructor's."""

from dataclasses import dataclass, field
from math import isqrt
from typing import Any, ClassVar, Literal

from ldit.config.serial import convert, show
from ldit.errors import ConfigError

COND_MOST = 1024
"""Largest width of the conditioning vector."""


@dataclass(frozen=True)
class BackboneConfig:
    """What class- and text-conditional networks share (Large-DiT, `DiT_Llama`)."""

    patch_size: int = 2
    """Side of a patch in latent pixels."""
    in_channels: int = 4
    """Channels of a latent."""
    dim: int = 4096
    """Width of the network."""
    n_layers: int = 32
    """Number of blocks."""
    n_heads: int = 32
    """Number of attention heads."""
    n_kv_heads: int | None = None
    """Number of key and value heads, each shared by a group of query heads. Default: as many as query heads."""
    multiple_of: int = 256
    """The FFN's width is rounded up to a multiple of this."""
    ffn_dim_multiplier: float | None = None
    """Factor of the FFN's width."""
    norm_eps: float = 1e-5
    """Epsilon of the RMS norms."""
    learn_sigma: bool = True
    """Predict the variance too: twice as many output channels."""
    qk_norm: bool | Literal["head"] = False
    """Normalise queries and keys: over the full width (true) or per head (head)."""
    rope: Literal["raster", "2d"] = "raster"
    """Rotary positions: raster = index in the sequence, 2d = row and column."""
    cond_channels: int = 0
    """Additional input channels, which have no output."""
    shared_adaln: bool = False
    """One adaLN for all blocks, plus a learned vector for each block, in place of an adaLN in each block."""
    value_residual: bool = False
    """Mix the values of each block's attention with those of the first block, by learned weights a head."""
    mid_layer: int = 0
    """Number of blocks before a second output head, which internal guidance uses; 0 = there is none."""

    def __post_init__(self) -> None:
        for name in ("patch_size", "in_channels", "dim", "n_layers", "n_heads", "multiple_of"):
            _within(self, name, 1)
        _within(self, "cond_channels", 0)
        if not 0 <= self.mid_layer < self.n_layers:
            raise ConfigError(f"model.mid_layer: must be 0 to {self.n_layers - 1}, got {self.mid_layer}")
        if self.n_kv_heads is not None:
            _within(self, "n_kv_heads", 1)
        if self.ffn_dim_multiplier is not None and not 0 < self.ffn_dim_multiplier <= 64:
            raise ConfigError(f"model.ffn_dim_multiplier: must be in (0, 64], got {self.ffn_dim_multiplier}")
        if self.dim % self.n_heads:
            raise ConfigError(f"model.n_heads: {self.n_heads} does not divide dim {self.dim}")
        if self.n_heads % self.kv_heads:
            raise ConfigError(f"model.n_kv_heads: {self.kv_heads} does not divide n_heads {self.n_heads}")
        if self.head_dim % (4 if self.rope == "2d" else 2):
            raise ConfigError(f"model.dim: head width {self.head_dim} does not fit rope {self.rope!r}")
        if not self.norm_eps > 0:
            raise ConfigError(f"model.norm_eps: must be positive, got {self.norm_eps}")

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def ffn_hidden(self) -> int:
        """SwiGLU width: 2/3 of 4·dim, optionally scaled, rounded up to `multiple_of`."""
        hidden = int(2 * (4 * self.dim) / 3)
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        return self.multiple_of * -(-hidden // self.multiple_of)

    @property
    def cond_dim(self) -> int:
        """Width of the conditioning vector."""
        return min(self.dim, COND_MOST)

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)


@dataclass(frozen=True)
class ClassModelConfig(BackboneConfig):
    """Class-conditional DiT. Label index `num_classes` is the null class when `class_dropout_prob` > 0.

    Without classes (`num_classes` 0) the null class 0 is the only label, for any `class_dropout_prob`.
    """

    kind: Literal["class"] = field(default="class", kw_only=True)
    input_size: int = 32
    """Side of the training latents."""
    class_dropout_prob: float = 0.1
    """Share of labels that training replaces by the null class; 0 = no null class, so no guidance."""
    num_classes: int = 1000
    """Number of classes, 0 = unconditional."""
    class_tokens: int = 0
    """Number of learned tokens of the class in front of the image tokens."""
    fine_layers: int = 0
    """Number of last blocks that work on patches of patch_size; the others then work on patches of twice that side.
    0 = all blocks work on patches of patch_size."""
    augment_labels: bool = False
    """Tell the network how a training image was augmented (objective.augment); nothing is augmented in sampling."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_class_fields(self)
        _within(self, "class_tokens", 0)
        if not 0 <= self.fine_layers < self.n_layers:
            raise ConfigError(f"model.fine_layers: must be 0 to {self.n_layers - 1}, got {self.fine_layers}")
        if self.input_size % self.side_unit:
            raise ConfigError(f"model.fine_layers: input_size {self.input_size} is no multiple of {self.side_unit}")

    @property
    def side_unit(self) -> int:
        """Height and width must be multiples of this: the side of the largest patches."""
        return self.patch_size * (2 if self.fine_layers else 1)

    @property
    def trunk_layers(self) -> int:
        """Number of blocks before those of `fine_layers`."""
        return self.n_layers - self.fine_layers

    @property
    def null_class(self) -> int | None:
        return self.num_classes if self.class_dropout_prob > 0 or not self.num_classes else None


@dataclass(frozen=True)
class TextModelConfig(BackboneConfig):
    """Text-conditional DiT over rows of patches, each with a token at its end, padded to `max_seq_len` tokens."""

    kind: Literal["text"] = field(default="text", kw_only=True)
    max_seq_len: int = 288
    """Number of tokens of an image with padding: an image of r rows and c columns of patches has r·(c + 1)."""
    cap_feat_dim: int = 5120
    """Width of the text features."""
    rope_scaling_factor: float = 1.0
    """Rotary positions are divided by this."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _within(self, "max_seq_len", 1)
        _within(self, "cap_feat_dim", 1)
        if not self.rope_scaling_factor > 0:
            raise ConfigError(f"model.rope_scaling_factor: must be positive, got {self.rope_scaling_factor}")

    @property
    def input_size(self) -> int:
        """Side of the largest square latent that `max_seq_len` tokens hold."""
        rows = (isqrt(4 * self.max_seq_len + 1) - 1) // 2  # the largest r with r·(r + 1) tokens
        return rows * self.patch_size

    @property
    def side_unit(self) -> int:
        """See `ClassModelConfig`."""
        return self.patch_size

    @property
    def trunk_layers(self) -> int:
        """Text models have one patch level."""
        return self.n_layers

    # What class models alone can have.
    fine_layers: ClassVar[int] = 0
    class_tokens: ClassVar[int] = 0
    augment_labels: ClassVar[bool] = False


@dataclass(frozen=True)
class OriginalDiTConfig:
    """The original DiT (facebookresearch/DiT), also the network of SiT."""

    kind: Literal["dit"] = field(default="dit", kw_only=True)
    input_size: int = 32
    """Side of the training latents."""
    patch_size: int = 2
    """Side of a patch in latent pixels."""
    in_channels: int = 4
    """Channels of a latent."""
    hidden_size: int = 1152
    """Width of the network."""
    depth: int = 28
    """Number of blocks."""
    num_heads: int = 16
    """Number of attention heads."""
    mlp_ratio: float = 4.0
    """Width of a block's MLP over that of the network."""
    class_dropout_prob: float = 0.1
    """Share of labels that training replaces by the null class; 0 = no null class, so no guidance."""
    num_classes: int = 1000
    """Number of classes, 0 = unconditional."""
    learn_sigma: bool = True
    """Twice as many output channels: DDPM learns the variance by them, SiT does not use them."""
    variant: Literal["original", "diffusers"] = "original"
    """diffusers' DiT embeds time with other frequencies, 10000^(-i/127) instead of 10000^(-i/128), and has 1e-5 as the
    epsilon of a block's second norm."""

    def __post_init__(self) -> None:
        for name in ("patch_size", "in_channels", "hidden_size", "depth", "num_heads"):
            _within(self, name, 1)
        if not 0 < self.mlp_ratio <= 64:
            raise ConfigError(f"model.mlp_ratio: must be in (0, 64], got {self.mlp_ratio}")
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise ConfigError(f"model.num_heads: {self.num_heads} does not fit hidden_size {self.hidden_size}")
        _check_class_fields(self)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def cond_channels(self) -> int:
        """The original DiT has no additional input channels."""
        return 0

    @property
    def mid_layer(self) -> int:
        """The original DiT has one output head."""
        return 0

    @property
    def side_unit(self) -> int:
        """See `ClassModelConfig`."""
        return self.patch_size

    @property
    def null_class(self) -> int | None:
        return self.num_classes if self.class_dropout_prob > 0 or not self.num_classes else None

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)


ModelConfig = ClassModelConfig | TextModelConfig | OriginalDiTConfig

_MOST = {
    "n_layers": 1024,
    "depth": 1024,
    "n_heads": 4096,
    "num_heads": 4096,
    "num_classes": 1 << 24,
    "max_seq_len": 1 << 20,
    "class_tokens": 4096,
}


SWITCHES = ("shared_adaln", "value_residual", "mid_layer", "class_tokens", "fine_layers", "augment_labels")
"""Fields that the original does not have, and that are off unless they are set."""


def without_idle_switches(model: dict[str, Any]) -> dict[str, Any]:
    """A model section without switches that are off, as it was written before there were any."""
    return {name: value for name, value in model.items() if value or name not in SWITCHES}


def model_from_dict(data: Any, where: str = "model") -> ModelConfig:
    """The `model` section of a config.json; without a `kind` it is "class"."""
    config: ModelConfig = convert(ModelConfig, {"kind": "class", **data} if isinstance(data, dict) else data, where)
    return config


def _within(config: Any, name: str, least: int) -> None:
    """ConfigError for a size out of bounds: a file from outside must not be able to ask for a billion layers."""
    most = _MOST.get(name, 1 << 17)
    if not least <= getattr(config, name) <= most:
        raise ConfigError(f"model.{name}: must be {least} to {most}, got {show(getattr(config, name))}")


def _check_class_fields(config: Any) -> None:
    _within(config, "num_classes", 0)
    _within(config, "input_size", 1)
    if config.input_size % config.patch_size:
        raise ConfigError(f"model.input_size: {config.input_size} is not divisible by patch_size {config.patch_size}")
    if not 0 <= config.class_dropout_prob < 1:
        raise ConfigError(f"model.class_dropout_prob: must be in [0, 1), got {config.class_dropout_prob}")
