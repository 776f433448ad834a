"""RunConfig: what training adds to a model. Frozen dataclasses whose fields are the command line's flags."""

from dataclasses import dataclass, field
from typing import Any, Literal

from ldit.config.model import ClassModelConfig
from ldit.config.serial import from_dict, to_dict
from ldit.config.spec import (
    CodecConfig,
    FlowConfig,
    PixelCodecConfig,
    ProcessConfig,
    SamplingConfig,
    codec_from_dict,
    process_from_dict,
)
from ldit.errors import ConfigError

RUN_FORMAT = "run-1"


@dataclass(frozen=True)
class DataConfig:
    """Where the pictures are and how they are cut."""

    path: str = ""
    """Folder of class folders, or the bundled "emoji64"."""
    image_size: int = 256
    """Side of the square training pictures, in pixels."""
    flip: bool = True
    """Mirror half of the pictures."""
    heldout: str | None = None
    """File beside the class folders that lists pictures kept from training, one relative path a line; default
    heldout.txt where there is one, "" = none."""
    max_per_class: int = 0
    """Use at most this many pictures of a class, 0 = all (evens out lopsided sets)."""


@dataclass(frozen=True)
class TrainConfig:
    """Steps, batch, learning rate, and what happens how often (0 = never)."""

    steps: int = 100_000
    """Optimiser steps of the whole run."""
    batch_size: int = 256
    """Global batch size."""
    micro_batch_size: int | None = None
    """Samples in one pass through the network; default the whole batch."""
    lr: float = 1e-4
    """Peak learning rate."""
    warmup: int = 0
    """Steps of linear warm-up."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up; cosine falls to a hundredth at the last step."""
    seed: int = 0
    """Seed of weights, order, noise and times."""
    cooldown: int = 0
    """Last steps over which the rate falls linearly to zero."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Dtype of the compute copy of the weights and of activations; master weights are fp32."""
    grad_clip: float = 2.0
    """Largest gradient norm, 0 = off."""
    log_every: int = 100
    """Steps between log lines."""
    checkpoint_every: int = 1000
    """Steps between commits; the last step is always committed."""
    sample_every: int = 0
    """Steps between picture grids from EMA weights."""
    keep: int = 2
    """Committed steps kept, newest first; 0 = all."""


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser."""

    kind: Literal["adamw"] = "adamw"
    """The algorithm."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""


@dataclass(frozen=True)
class EMAConfig:
    """Moving average of the weights: decay min(decay, (1+n)/(10+n)) at step n."""

    decay: float = 0.9999
    """Decay after the warm-up."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """Flow times: t = sigmoid(mean + std·normal). DDPM draws its indices uniformly."""

    time_mean: float = 0.0
    """Mean before the sigmoid; above 0 = noisier."""
    time_std: float = 1.0
    """Deviation before the sigmoid."""


@dataclass(frozen=True)
class HeldoutConfig:
    """Loss on held-out pictures with fixed noise, by time bucket."""

    every: int = 0
    """Steps between measurements of the EMA weights."""
    num: int = 256
    """Pictures, spread over the held-out set."""


@dataclass(frozen=True)
class RunConfig:
    """One training run, resolved. Saved as RUN/config.json."""

    model: ClassModelConfig
    process: ProcessConfig = field(default_factory=FlowConfig)
    codec: CodecConfig = field(default_factory=PixelCodecConfig)
    sampling: SamplingConfig | None = None
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    heldout: HeldoutConfig = field(default_factory=HeldoutConfig)

    @property
    def micro_batch_size(self) -> int:
        return self.train.micro_batch_size or self.train.batch_size

    def check(self) -> None:
        """ConfigError naming the key whose value cannot work."""
        t = self.train
        for name in ("steps", "batch_size"):
            if getattr(t, name) < 1:
                raise ConfigError(f"train.{name}: must be at least 1, got {getattr(t, name)}")
        for name in ("log_every", "checkpoint_every", "sample_every", "warmup", "cooldown", "keep"):
            if getattr(t, name) < 0:
                raise ConfigError(f"train.{name}: must not be negative, got {getattr(t, name)}")
        if self.micro_batch_size < 1 or t.batch_size % self.micro_batch_size:
            raise ConfigError(f"train.micro_batch_size: {t.micro_batch_size} does not divide batch_size {t.batch_size}")
        if not t.lr > 0:
            raise ConfigError(f"train.lr: must be positive, got {t.lr}")
        if self.model.cond_channels:
            raise ConfigError("model.cond_channels: training with extra input channels is not built yet")
        for name in ("every", "num"):
            if getattr(self.heldout, name) < 0:
                raise ConfigError(f"heldout.{name}: must not be negative, got {getattr(self.heldout, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self.optim, name) < 1:
                raise ConfigError(f"optim.{name}: must be in [0, 1), got {getattr(self.optim, name)}")
        if not 0 <= self.optim.weight_decay < float("inf"):
            raise ConfigError(f"optim.weight_decay: must not be negative, got {self.optim.weight_decay}")
        if not 0 <= t.grad_clip < float("inf"):
            raise ConfigError(f"train.grad_clip: must not be negative, got {t.grad_clip}")
        if t.cooldown and t.schedule == "cosine":
            raise ConfigError("train.cooldown: goes with the constant schedule only")
        if not 0 <= self.ema.decay < 1:
            raise ConfigError(f"ema.decay: must be in [0, 1), got {self.ema.decay}")
        if not self.data.path:
            raise ConfigError("data.path: name the folder of training pictures (--data.path DIR)")
        side, factor = self.data.image_size, self.codec.factor
        if side % factor or side // factor != self.model.input_size:
            raise ConfigError(
                f"data.image_size: {side} pixels give latents of {side / factor:g}, "
                f"the model takes {self.model.input_size}"
            )

    def to_json(self) -> dict[str, Any]:
        return {"format": RUN_FORMAT, **to_dict(self)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "RunConfig":
        """Strict reader of RUN/config.json."""
        if not isinstance(data, dict) or data.get("format") != RUN_FORMAT:
            raise ConfigError(
                f"format: expected {RUN_FORMAT!r}, got {data.get('format') if isinstance(data, dict) else data!r}"
            )
        body = {key: value for key, value in data.items() if key not in ("format", "process", "codec")}
        config = from_dict(cls, body)
        return cls(
            **{
                **{name: getattr(config, name) for name in cls.__dataclass_fields__},
                "process": process_from_dict(data.get("process")),
                "codec": codec_from_dict(data.get("codec")),
            }
        )
