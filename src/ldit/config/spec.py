"""ModelSpec: everything that weights need to become images. It is the config.json of every step and export."""

from dataclasses import dataclass, field
from typing import Any, Literal

from ldit.config.model import ModelConfig, TextModelConfig
from ldit.config.serial import from_dict, show, to_dict
from ldit.errors import ConfigError

FORMAT = 1
Predicted = Literal["v", "x0", "eps", "score"]
PathName = Literal["linear", "gvp", "vp"]


@dataclass(frozen=True)
class DDPMConfig:
    """1000 steps, linear betas, eps prediction; the variance is in a learned range when the network has 2C outputs."""

    kind: Literal["ddpm"] = field(default="ddpm", kw_only=True)

    @property
    def convention(self) -> str:
        """The network's inputs and outputs, in words: models of the same convention can guide each other."""
        return self.kind

    @property
    def has_time_distribution(self) -> bool:
        """Whether the distribution of training times can be chosen (`ObjectiveConfig`)."""
        return False

    def published_sampling(self, channels: int) -> "SamplingConfig":
        """The published sampling defaults, for latents of `channels` channels."""
        return SamplingConfig("ddpm", 250, 4.0, min(3, channels))


@dataclass(frozen=True)
class FlowConfig:
    """Flow between data and noise, with times from 0 to 1, on a straight line by default."""

    kind: Literal["flow"] = field(default="flow", kw_only=True)
    prediction: Predicted = "v"
    """What the network predicts: v = velocity, x0 = data, eps = noise, score = -noise/sigma."""
    time_scale: float = 1000.0
    """The network is given the flow's time multiplied by this."""
    data_at: Literal[0, 1] = 0
    """The flow's time at which there is data; noise is at the other end."""
    shift: float = 1.0
    """Shift of times for larger images; above 1 = more noise."""
    path: PathName = "linear"
    """Path from data to noise: linear (a straight line), gvp (cosine and sine) or vp (diffusion), as in SiT."""

    def __post_init__(self) -> None:
        if not self.shift > 0:
            raise ConfigError(f"process.shift: must be positive, got {self.shift}")
        if self.path != "linear" and self.shift != 1.0:
            raise ConfigError(f"process.shift: {self.shift} is for the linear path, not {self.path}")
        if self.path != "linear" and self.prediction == "x0":
            raise ConfigError(f"process.prediction: x0 is for the linear path, not {self.path}")

    @property
    def convention(self) -> str:
        """See `DDPMConfig`. The shift is not part of it: it changes which times occur, not what they mean."""
        path = "" if self.path == "linear" else f" on the {self.path} path"
        return f"flow of {self.prediction}{path} (time_scale {self.time_scale:g}, data_at {self.data_at})"

    @property
    def has_time_distribution(self) -> bool:
        """See `DDPMConfig`."""
        return True

    def published_sampling(self, channels: int) -> "SamplingConfig":
        """See `DDPMConfig`. Of a SiT model they are those of SiT's code, with guidance of three channels: its SDE; on
        curved paths, where `euler-maruyama` has other coefficients than SiT's, its ODE."""
        if not self.is_sit:
            return SamplingConfig("heun", 25, 1.5, "all")
        if self.path == "linear":
            return SamplingConfig("euler-maruyama", 250, 4.0, min(3, channels), last_step="mean:0.04")
        return SamplingConfig("dopri5", 50, 4.0, min(3, channels))

    @property
    def is_sit(self) -> bool:
        """Whether times and prediction are of SiT, on any of its paths."""
        return (self.time_scale, self.data_at, self.shift) == (1.0, 1, 1.0) and self.prediction != "x0"


def without_defaults_added(process: dict[str, Any]) -> dict[str, Any]:
    """A process section without keys that younger versions added, where they are as the process was before."""
    return {name: value for name, value in process.items() if (name, value) != ("path", "linear")}


SIT = FlowConfig(prediction="v", time_scale=1.0, data_at=1)
"""SiT (Ma et al. 2024): velocity of the straight path from noise at 0 to data at 1, t given as it is."""


@dataclass(frozen=True)
class ClassConditionerConfig:
    """Class labels; `names[i]` is the name of class i, None = unknown."""

    kind: Literal["class"] = field(default="class", kw_only=True)
    names: tuple[str, ...] | None = None


@dataclass(frozen=True)
class TextConditionerConfig:
    """Prompts, embedded by a frozen language model."""

    kind: Literal["text"] = field(default="text", kw_only=True)
    encoder: str = "meta-llama/Llama-2-7b-hf"
    """Folder or Hub id of a model in transformers' layout."""
    max_tokens: int = 128
    """Longer texts are cut to so many tokens."""
    null: str = ""
    """The text that stands for no prompt."""
    tokenizer: str | None = None
    """Folder or Hub id of the tokenizer. Default: that of the encoder."""
    has_null: bool = True
    """Whether training replaced some texts by the null one, as guidance needs."""

    def __post_init__(self) -> None:
        if not 1 <= self.max_tokens <= 1 << 16:
            raise ConfigError(f"conditioner.max_tokens: must be 1 to {1 << 16}, got {show(self.max_tokens)}")


@dataclass(frozen=True)
class PixelCodecConfig:
    """No autoencoder: latents are RGB images in [-1, 1]."""

    kind: Literal["pixels"] = field(default="pixels", kw_only=True)

    @property
    def factor(self) -> int:
        return 1


@dataclass(frozen=True)
class AutoencoderConfig:
    """A KL autoencoder in diffusers' layout. The network sees (z - shift) * scale of its latents z."""

    kind: Literal["autoencoder_kl"] = field(default="autoencoder_kl", kw_only=True)
    name: str = "stabilityai/sd-vae-ft-ema"
    """Name of a bundled autoencoder, Hub id, or folder (./NAME if a bundled one has the same name)."""
    scale: float | tuple[float, ...] = 0.18215
    """Scale of the latents: one number, or one per channel."""
    shift: float | tuple[float, ...] = 0.0
    """Shift of the latents: one number, or one per channel."""
    factor: int = 8
    """Side of an image over the side of its latent."""

    def __post_init__(self) -> None:
        if not 1 <= self.factor <= 1024:
            raise ConfigError(f"codec.factor: must be 1 to 1024, got {show(self.factor)}")


@dataclass(frozen=True)
class SamplingConfig:
    """The defaults with which images are sampled."""

    solver: str = "ddpm"
    """ddpm, ddim, euler, heun, ab2, ab3, ab4, dpm++2m (dpm++), dpm++3m, dpm++2m-sde, unipc2, unipc3, unipc2-bh1,
    unipc3-bh1, euler-maruyama or dopri5."""
    steps: int = 250
    """Number of solver steps."""
    guidance: float = 4.0
    """Scale of classifier-free guidance; 1 = off."""
    guidance_channels: int | Literal["all"] = "all"
    """Number of latent channels that are guided, or all."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Noise times between which guidance is on (0 = data, 1 = noise)."""
    grid: str = "uniform"
    """How the steps are spread over noise time: uniform, shifted:K, karras, logsnr, cosine, or a falling list such as
    1,0.6,0.2."""
    eta: float = 0.0
    """Noise that ddim adds at each step: 0 = none, 1 = as much as ddpm."""
    guidance_schedule: str = "constant"
    """How the guidance scale changes over noise time: constant, linear or cosine (larger towards data; the mean is the
    scale)."""
    rope_scaling: str = "none"
    """How rotary positions are scaled for images larger than in training: none, linear, ntk or time-aware."""
    proportional_attention: bool = False
    """Scale attention so that its entropy stays as in training when the number of tokens differs."""
    diffusion: str = "sigma"
    """Noise that euler-maruyama adds: SiT's diffusion coefficient constant, sigma, linear, sbdm, decreasing or
    increasing-decreasing, with a factor as in sigma:0.5."""
    last_step: str = "tweedie"
    """euler-maruyama's step to clean data: mean, tweedie, euler or none, with its length in noise time as in
    mean:0.04."""
    tolerance: float = 1e-3
    """Relative error that dopri5 allows in a step; the absolute one is a thousandth of it."""


@dataclass(frozen=True)
class CascadeConfig:
    """A second stage: the network also sees each image at a smaller size, enlarged to its own (model.cond_channels)."""

    size: int = 0
    """Side of the small images in pixels; 0 = none, the model is no second stage."""
    noise: float = 0.1
    """Training adds noise to them, of a deviation drawn evenly up to this: those of a first stage have faults."""


ProcessConfig = DDPMConfig | FlowConfig
ConditionerConfig = ClassConditionerConfig | TextConditionerConfig
CodecConfig = PixelCodecConfig | AutoencoderConfig


@dataclass(frozen=True)
class ModelSpec(dict[str, Any]):
    """Network, process, codec, and optionally conditioner, sampling defaults and a record of the training.

    It is also the dict in config.json, so that it can be dumped and read as a dict.
    """

    model: ModelConfig
    process: ProcessConfig
    codec: CodecConfig
    conditioner: ConditionerConfig | None = None
    sampling: SamplingConfig | None = None
    training: dict[str, Any] | None = None
    cascade: CascadeConfig | None = None

    def __post_init__(self) -> None:
        names, model = self.class_names, self.model
        if names is not None and not isinstance(model, TextModelConfig) and len(names) != model.num_classes:
            raise ConfigError(f"conditioner.names: {len(names)} names for {model.num_classes} classes")
        if isinstance(self.codec, AutoencoderConfig):
            for key, value in (("scale", self.codec.scale), ("shift", self.codec.shift)):
                if isinstance(value, tuple) and len(value) != self.model.in_channels:
                    raise ConfigError(f"codec.{key}: {len(value)} values for {self.model.in_channels} channels")
        if isinstance(self.codec, PixelCodecConfig) and self.model.in_channels != 3:
            raise ConfigError(f"model.in_channels: a pixel codec needs 3, got {self.model.in_channels}")
        self.update(self.to_json())

    @property
    def class_names(self) -> tuple[str, ...] | None:
        return self.conditioner.names if isinstance(self.conditioner, ClassConditionerConfig) else None

    @property
    def sampling_defaults(self) -> SamplingConfig:
        """The spec's own section, else the published defaults of its process."""
        return self.sampling or self.process.published_sampling(self.model.in_channels)

    def to_json(self) -> dict[str, Any]:
        out: dict[str, Any] = {"format": FORMAT}
        for name in ("model", "process", "conditioner", "codec", "sampling", "training", "cascade"):
            if getattr(self, name) is not None:
                out[name] = to_dict(getattr(self, name))
        return out

    @classmethod
    def from_json(cls, data: Any, where: str = "config.json") -> "ModelSpec":
        """Strict reader; ConfigError names the key at fault."""
        if not isinstance(data, dict):
            raise ConfigError(f"{where}: expected an object")
        if not isinstance(data.get("format"), int) or isinstance(data.get("format"), bool):
            raise ConfigError(f"{where}: missing key 'format'")
        if data["format"] > FORMAT:
            raise ConfigError(f"{where}: format {data['format']} is newer than {FORMAT}; update ldit")
        body = {key: value for key, value in data.items() if key != "format"}
        if isinstance(body.get("model"), dict):
            body["model"] = {"kind": "class", **body["model"]}
        try:
            return from_dict(cls, body)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
