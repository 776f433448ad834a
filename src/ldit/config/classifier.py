"""Classifiers that `ldit train` trains as extractors: network, run, and the content of their config.json."""

from dataclasses import dataclass, field
from typing import Any, Literal

from ldit.config.run import BaseRun, check_format, check_idle, model_kind
from ldit.config.sections import TrainConfig
from ldit.config.serial import from_dict, show, to_dict
from ldit.config.spec import FORMAT
from ldit.errors import ConfigError

CLASSIFIER = "classifier"
LEAST_SIDE, MOST_SIDE = 32, 4096  # pixels


@dataclass(frozen=True)
class ClassifierModelConfig:
    """A residual convolutional network (He et al. 2016) with group norms. The first layer and every level but the first
    halve height and width. The classes are those of the data."""

    kind: Literal["classifier"] = field(default="classifier", kw_only=True)
    widths: tuple[int, ...] = (32, 64, 128, 128)
    """Channels of each level; the last number is that of the features."""
    norm_num_groups: int = 8
    """Groups of the group norms; divides the channels of every level."""

    def __post_init__(self) -> None:
        if not 1 <= self.norm_num_groups <= 4096:
            raise ConfigError(f"model.norm_num_groups: must be 1 to 4096, got {show(self.norm_num_groups)}")
        if not 1 <= len(self.widths) <= 8:
            raise ConfigError(f"model.widths: 1 to 8 levels, got {len(self.widths)}")
        for width in self.widths:
            if not 1 <= width <= 8192 or width % self.norm_num_groups:
                raise ConfigError(
                    f"model.widths: {show(width)} is not a multiple of norm_num_groups {self.norm_num_groups} "
                    "up to 8192"
                )

    def check_side(self, key: str, side: int) -> None:
        """ConfigError for images of a size that such a network does not take; `key` names the size in messages."""
        if not LEAST_SIDE <= side <= MOST_SIDE:
            raise ConfigError(
                f"{key}: a classifier takes images of {LEAST_SIDE} to {MOST_SIDE} pixels, got {show(side)}"
            )
        places = side
        for width in self.widths:
            places = -(-places // 2)
            if width // self.norm_num_groups * places**2 < 2:  # a norm over one number is always 0
                raise ConfigError(
                    f"model.widths: {width} channels in {self.norm_num_groups} groups, of {places} x {places} places "
                    f"each at {key} {side}: a group norm needs two numbers"
                )


@dataclass(frozen=True)
class ClassifierObjectiveConfig:
    """Cross-entropy, and regularisation against overfitting."""

    label_smoothing: float = 0.05
    """Share of the target probability that is spread over all classes."""
    dropout: float = 0.2
    """Share of the features that are dropped before the last layer."""
    augment: bool = True
    """Rotate, shift, scale, colour and blur each image at random, and add noise (data.flip mirrors)."""
    balanced: bool = True
    """Weight each image inversely to the size of its class, so that all classes count equally; mean weight 1."""


# Keys that have no effect in such a run: (key, the only value, why).
_IDLE: tuple[tuple[str, Any, str], ...] = (
    ("train.attention_every", 0, "a classifier has no attention"),
    ("train.sample_every", 0, "a classifier makes no images"),
    ("train.init_from", "", "classifiers start from fresh weights"),
    ("train.init_ema", True, "classifiers start from fresh weights"),
    ("data.codec_precision", "fp32", "training a classifier encodes no images beforehand"),
    ("ema.power", (), "`ldit ema` supports diffusion models only"),
    ("optim.kind", "adamw", "classifiers are trained with 'adamw'"),
    ("parallel.tp", 1, "the layers of a classifier are not split over processes"),
    ("parallel.recompute", "none", "a classifier has no blocks to recompute"),
    ("parallel.compile", False, "a classifier has no blocks to compile"),
)


@dataclass(frozen=True, kw_only=True)
class ClassifierRun(BaseRun):
    """The complete configuration of a run that trains a classifier, saved as RUN/config.json."""

    model: ClassifierModelConfig = field(default_factory=ClassifierModelConfig)
    objective: ClassifierObjectiveConfig = field(default_factory=ClassifierObjectiveConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(attention_every=0, sample_every=0))

    def check(self) -> None:
        """ConfigError naming the key whose value cannot work, whatever the number of processes."""
        super().check()
        self.model.check_side("data.image_size", self.data.image_size)
        for key in ("label_smoothing", "dropout"):
            value = getattr(self.objective, key)
            if not 0 <= value < 1:
                raise ConfigError(f"objective.{key}: must be in [0, 1), got {value}")
        check_idle(self, _IDLE)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "ClassifierRun":
        """Strict reader of RUN/config.json."""
        check_format(data)
        return from_dict(cls, {key: value for key, value in data.items() if key != "format"})


@dataclass(frozen=True)
class ClassifierSpec(dict[str, Any]):
    """Everything that a classifier's weights need to give classes and features: the config.json of a step of its
    run."""

    model: ClassifierModelConfig
    image_size: int
    """Side of the images that it was trained on, in pixels; others are resized to it."""
    names: tuple[str, ...]
    """Class names by index."""
    training: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.model.check_side("image_size", self.image_size)
        if len(self.names) < 2:
            raise ConfigError(f"names: a classifier needs two classes, got {show(list(self.names))}")
        self.update(self.to_json())

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.names

    def to_json(self) -> dict[str, Any]:
        values = {name: to_dict(getattr(self, name)) for name in ("model", "image_size", "names", "training")}
        return {"format": FORMAT, **{name: value for name, value in values.items() if value is not None}}

    @classmethod
    def from_json(cls, data: Any, where: str = "config.json") -> "ClassifierSpec":
        """Strict reader; ConfigError names the key at fault."""
        if not is_classifier(data):
            raise ConfigError(f"{where}: not a classifier of ours")
        if data.get("format") != FORMAT:
            raise ConfigError(f"{where}: format: expected {FORMAT}, got {show(data.get('format'))}")
        try:
            return from_dict(cls, {key: value for key, value in data.items() if key != "format"})
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None


def is_classifier(data: Any) -> bool:
    """Whether this is the content of the config.json of a classifier of ours, of a step or a run."""
    return model_kind(data) == CLASSIFIER
