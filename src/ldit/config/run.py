"""RunConfig: the configuration of a run of a diffusion model; BaseRun: what all kinds of runs share."""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from math import isfinite
from typing import Any, Self

from ldit.config.conditions import check_buckets, check_cascade, check_text
from ldit.config.model import ModelConfig, OriginalDiTConfig, TextModelConfig
from ldit.config.sections import (
    DataConfig,
    EMAConfig,
    EvalConfig,
    GuardConfig,
    HeldoutConfig,
    ObjectiveConfig,
    OptimConfig,
    ParallelConfig,
    StageConfig,
    TextConfig,
    TrackConfig,
    TrainConfig,
)
from ldit.config.serial import from_dict, show, to_dict
from ldit.config.spec import (
    CascadeConfig,
    CodecConfig,
    FlowConfig,
    PixelCodecConfig,
    ProcessConfig,
    SamplingConfig,
)
from ldit.errors import ConfigError

RUN_FORMAT = "run-1"
MOST_NOISES = 64
"""Largest number of noises that are drawn for an image."""
FLOW_ONLY = ("time_mean", "time_std", "times", "direction", "loss_weight")
"""Settings of the objective that DDPM does not have."""
_NOT_OF_DIT = (
    *((f"objective.{name}", 0.0, "the original DiT does not have it") for name in ("augment", "dropout", "route")),
    ("parallel.tp", 1, "the original DiT is not cut; use parallel.shard"),
)
MOST_SECONDS = 7 * 86_400  # an upper bound that timers and torch's store accept

# Smallest allowed value of numbers that have one.
_LEAST = {
    "data.max_per_class": 0,
    "data.workers": 0,
    "data.max_pixels": 1,
    "train.steps": 1,
    "train.batch_size": 1,
    "train.warmup": 0,
    "train.cooldown": 0,
    "train.grad_clip": 0,
    "train.log_every": 0,
    "train.checkpoint_every": 0,
    "train.sample_every": 0,
    "train.attention_every": 0,
    "train.keep": 0,
    "train.keep_every": 0,
    "optim.weight_decay": 0,
    "optim.every": 1,
    "optim.base_width": 0,
    "ema.snapshot_every": 0,
    "ema.every": 1,
    "heldout.every": 0,
    "heldout.num": 0,
    "guard.spike_z": 0,
    "guard.limit": 1,
    "parallel.tp": 1,
    "parallel.shard": 0,
    "parallel.replicate": 1,
}


@dataclass(frozen=True, kw_only=True)
class BaseRun:
    """The sections that all kinds of runs share. Each kind adds `model`, and sections of its own."""

    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    heldout: HeldoutConfig = field(default_factory=HeldoutConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    track: TrackConfig = field(default_factory=TrackConfig)

    def check(self) -> None:
        """ConfigError naming the key whose value cannot work, whatever the number of processes."""
        # Numbers that have a smallest value, and finite numbers everywhere.
        for key, least in _LEAST.items():
            section, name = key.split(".")
            value = getattr(getattr(self, section), name)
            if not least <= value < float("inf"):
                word = "must not be negative" if least == 0 else f"must be at least {least}"
                raise ConfigError(f"{key}: {word}, got {value}")
        for root in fields(self):
            part = getattr(self, root.name)
            for entry in fields(part) if is_dataclass(part) else ():
                value = getattr(part, entry.name)
                if isinstance(value, float) and not isfinite(value):
                    raise ConfigError(f"{root.name}.{entry.name}: must be a finite number, got {value}")
        # Bounds from outside: torch's seeds, and the timers that parallel.timeout goes to.
        t = self.train
        if not 0 <= t.seed < 1 << 63:
            raise ConfigError(f"train.seed: must be 0 to 2^63-1, got {show(t.seed)}")
        if self.parallel.compile and self.parallel.eager:
            raise ConfigError("parallel.eager: is the opposite of parallel.compile")
        if self.parallel.timeout > MOST_SECONDS:
            raise ConfigError(f"parallel.timeout: at most {MOST_SECONDS:g} s, got {self.parallel.timeout:g}")
        # Batch, and numbers that must be positive.
        micro = t.batch_size if t.micro_batch_size is None else t.micro_batch_size
        if micro < 1 or t.batch_size % micro:
            raise ConfigError(f"train.micro_batch_size: {micro} does not divide batch_size {t.batch_size}")
        for key, value in (
            ("train.lr", t.lr),
            ("parallel.timeout", self.parallel.timeout),
            ("data.timeout", self.data.timeout),
        ):
            if not value > 0:
                raise ConfigError(f"{key}: must be positive, got {value}")
        # Decays of averages and of the optimiser's moments.
        decays = [("ema.decay", self.ema.decay), *(("ema.more", value) for value in self.ema.more)]
        decays += [(f"optim.{name}", getattr(self.optim, name)) for name in ("beta1", "beta2", "momentum")]
        for key, value in decays:
            if not 0 <= value < 1:
                raise ConfigError(f"{key}: must be in [0, 1), got {value}")
        if self.optim.every > 1 and not self.optim.chunked:
            raise ConfigError("optim.every: goes with optim.chunked")
        if self.optim.kind != "muon" and (self.optim.chunked or self.optim.precision != "run"):
            raise ConfigError("optim.chunked and optim.precision: go with optim.kind muon")
        self._check_averages()
        # The learning rate's schedule.
        for name in ("warmup", "cooldown"):
            share = getattr(t, f"{name}_share")
            if not 0 <= share <= 1:
                raise ConfigError(f"train.{name}_share: must be from 0 to 1, got {share}")
        if t.cooldown_steps and t.warmup_steps + t.cooldown_steps > t.steps:
            raise ConfigError(
                f"train.steps: {t.steps} are fewer than train.warmup {t.warmup_steps} + train.cooldown "
                f"{t.cooldown_steps}; shorten those too (--train.warmup N --train.cooldown N)"
            )
        if t.schedule == "inverse-sqrt" and not t.warmup_steps:
            raise ConfigError("train.warmup: schedule inverse-sqrt needs warm-up steps")
        # The training images.
        if self.data.buckets and not isinstance(self, RunConfig):
            raise ConfigError("data.buckets: is for diffusion models")
        if not self.data.path:
            raise ConfigError("data.path: name the folder of training images (--data.path DIR)")
        if not all(0 <= value <= 255 for value in self.data.background):
            raise ConfigError(f"data.background: three values from 0 to 255, got {show(self.data.background)}")

    def _check_averages(self) -> None:
        # Power averages. Their width is part of a file's name, to four decimals.
        for width in self.ema.power:
            if not 0 < width < 0.28:  # the width of gamma = 0, the plain mean, is 0.2887
                raise ConfigError(f"ema.power: a relative width must be in (0, 0.28), got {width}")
            if round(width, 4) != width:
                raise ConfigError(f"ema.power: at most four decimals, got {width}")
        for key, values in (("ema.more", (self.ema.decay, *self.ema.more)), ("ema.power", self.ema.power)):
            if len(set(values)) != len(values):
                raise ConfigError(f"{key}: the same value twice")
        if self.ema.snapshot_every and not self.ema.power:
            raise ConfigError("ema.snapshot_every: there are no power averages (--ema.power 0.05 0.10)")
        if self.ema.every > self.train.steps:
            raise ConfigError(f"ema.every: {self.ema.every} is more than train.steps {self.train.steps}")
        if self.ema.every > 1 and self.ema.power:
            raise ConfigError("ema.every: power averages (ema.power) are updated at every step")

    def with_warmup(self, begun: int | None) -> Self:
        """With the number of warm-up steps in place of a share: that of the run as it was `begun`, else of all steps. A
        run that is made longer must not warm up again."""
        train = self.train
        if train.warmup or not train.warmup_share:
            return self
        steps = train.warmup_steps if begun is None else begun
        return replace(self, train=replace(train, warmup=steps))

    def to_json(self) -> dict[str, Any]:
        """The content of RUN/config.json: the sections of this kind of run first, then the shared ones."""
        values, shared = to_dict(self), {entry.name for entry in fields(BaseRun)}
        own = {name: value for name, value in values.items() if name not in shared}
        return {"format": RUN_FORMAT, **own, **{name: values[name] for name in values if name in shared}}


def model_kind(config: object) -> str | None:
    """`model.kind` in the content of a config.json, of a run or a step; None where there is none."""
    model = config.get("model") if isinstance(config, dict) else None
    kind = model.get("kind") if isinstance(model, dict) else None
    return kind if isinstance(kind, str) else None


def check_idle(run: BaseRun, rows: Iterable[tuple[str, Any, str]]) -> None:
    """ConfigError for a key that has no effect in such a run but is set. `rows`: (key, the only value, why)."""
    for key, only, why in rows:
        section, name = key.split(".")
        value = getattr(getattr(run, section), name)
        if value != only:
            raise ConfigError(f"{key}: {why}, got {show(value)}")


@dataclass(frozen=True, kw_only=True)
class RunConfig(BaseRun):
    """The complete configuration of a run that trains a diffusion model, saved as RUN/config.json."""

    model: ModelConfig
    process: ProcessConfig = field(default_factory=FlowConfig)
    codec: CodecConfig = field(default_factory=PixelCodecConfig)
    sampling: SamplingConfig | None = None
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    stages: tuple[StageConfig, ...] = ()
    """The first stages of the run, at smaller sizes; the rest is at data.image_size."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    text: TextConfig = field(default_factory=TextConfig)
    cascade: CascadeConfig = field(default_factory=CascadeConfig)

    def check(self) -> None:
        """ConfigError naming the key whose value cannot work, whatever the number of processes."""
        classes = 0 if isinstance(self.model, TextModelConfig) else self.model.num_classes
        if (fitted := self.fitted(classes)) != self:  # the classes follow when the data are open
            fitted.check()
            return
        super().check()
        # The evaluation during training.
        for key, least in (("every", 0), ("num", 2), ("batch_size", 1)):
            value = getattr(self.eval, key)
            if value < least:
                raise ConfigError(f"eval.{key}: must be at least {least}, got {value}")
        # What is not supported in training.
        if isinstance(self.model, OriginalDiTConfig):
            check_idle(self, _NOT_OF_DIT)
        else:
            for key, heads in (("n_heads", self.model.n_heads), ("n_kv_heads", self.model.n_kv_heads)):
                if heads is not None and heads % self.parallel.tp:
                    raise ConfigError(f"parallel.tp: {self.parallel.tp} does not divide model.{key} {heads}")
        for check in (check_text, check_buckets, check_cascade):
            check(self)
        self._check_objective()
        self._check_stages()
        # Images must become latents of the size that the network takes.
        side, factor = self.data.image_size, self.codec.factor
        if side % factor or side // factor != self.model.input_size:
            raise ConfigError(
                f"data.image_size: {side} pixels give latents of {side / factor:g}, the model takes "
                f"{self.model.input_size} (--model.input-size {side // factor}, or --data.fit-model)"
            )

    def fitted(self, num_classes: int) -> "RunConfig":
        """With data.fit_model: the configuration whose model has so many classes and takes data.image_size."""
        if not self.data.fit_model:
            return self
        side = self.data.image_size // self.codec.factor
        if isinstance(self.model, TextModelConfig):
            rows = side // self.model.patch_size
            tokens = rows * rows + rows * (2 if self.data.buckets else 1)
            return replace(self, model=replace(self.model, max_seq_len=tokens))
        return replace(self, model=replace(self.model, num_classes=num_classes, input_size=side))

    def _check_objective(self) -> None:
        objective, off = self.objective, ObjectiveConfig()
        if not self.process.has_time_distribution:
            own = [f"objective.{name}" for name in FLOW_ONLY if getattr(objective, name) != getattr(off, name)]
            if own:
                raise ConfigError(f"{own[0]}: DDPM draws its times evenly and predicts eps; this setting is flow's")
        self._check_flow(objective)
        for name in ("time_mean", "time_std") if objective.times == "uniform" else ():
            if getattr(objective, name) != getattr(off, name):
                raise ConfigError(f"objective.{name}: has no effect with objective.times uniform")
        for name in ("min_snr", "direction", "mid_weight"):
            if getattr(objective, name) < 0:
                raise ConfigError(f"objective.{name}: must not be negative, got {getattr(objective, name)}")
        if not 1 <= objective.nearest_of <= MOST_NOISES:
            raise ConfigError(f"objective.nearest_of: must be 1 to {MOST_NOISES}, got {objective.nearest_of}")
        for name in ("augment", "dropout", "route"):
            if not 0 <= getattr(objective, name) < 1:
                raise ConfigError(f"objective.{name}: must be in [0, 1), got {getattr(objective, name)}")
        first, last = objective.route_blocks
        if not objective.route and (first, last) != (0, 0):
            raise ConfigError(f"objective.route_blocks: has no effect without objective.route, got {first} {last}")
        # What needs something of the model.
        if isinstance(self.model, OriginalDiTConfig):
            return
        if bool(objective.augment) != self.model.augment_labels:
            raise ConfigError("objective.augment: goes with model.augment_labels, and neither without the other")
        if objective.augment and not isinstance(self.codec, PixelCodecConfig):
            raise ConfigError("objective.augment: is for pixel models")
        if objective.route and not 1 <= first <= last <= self.model.trunk_layers:
            most = self.model.trunk_layers
            raise ConfigError(f"objective.route_blocks: two numbers from 1 to {most} are needed, got {first} {last}")
        if objective.route and (self.model.value_residual or first <= self.model.mid_layer < last):
            raise ConfigError("objective.route: goes with neither model.value_residual nor a head between its blocks")

    def _check_flow(self, objective: ObjectiveConfig) -> None:
        """What goes with one kind of prediction or path alone."""
        process, off = self.process, ObjectiveConfig()
        if not isinstance(process, FlowConfig):
            return
        of_noise = process.prediction in ("eps", "score")
        if objective.loss_weight != off.loss_weight and not of_noise:
            raise ConfigError(f"objective.loss_weight: is for predictions of eps and score, not {process.prediction}")
        for name in ("min_snr", "direction") if of_noise or process.path != "linear" else ():
            if getattr(objective, name) != getattr(off, name):
                raise ConfigError(f"objective.{name}: is for velocity or data on the linear path")
        if process.path != "linear" and any(stage.shift is not None for stage in self.stages):
            raise ConfigError(f"stages: shift is for the linear path, not {process.path}")

    def _check_stages(self) -> None:
        side, factor = self.data.image_size, self.codec.factor
        if self.stages and not isinstance(self.model, OriginalDiTConfig) and self.model.rope != "2d":
            raise ConfigError("stages: need model.rope 2d: with raster positions a row would move at each size")
        for stage in self.stages:
            unit = factor * self.model.side_unit
            if not 1 <= stage.size < side or side % stage.size or stage.size % unit:
                raise ConfigError(
                    f"stages: size must be a multiple of {unit} that divides data.image_size {side}, got {stage.size}"
                )
            if stage.steps < 1:
                raise ConfigError(f"stages: steps must be at least 1, got {stage.steps}")
            if stage.shift is not None and not (stage.shift > 0 and self.process.has_time_distribution):
                raise ConfigError(f"stages: shift must be positive and is flow's, got {stage.shift}")
        if sum(stage.steps for stage in self.stages) >= self.train.steps > 0 and self.stages:
            raise ConfigError(f"stages: they take all of train.steps {self.train.steps}; the last part is at full size")

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "RunConfig":
        """Strict reader of RUN/config.json."""
        check_format(data)
        for key in ("process", "codec"):  # their defaults are for new runs, not for files
            if key not in data:
                raise ConfigError(f"missing key {key!r}")
        model = data.get("model")
        if isinstance(model, dict):
            data = {**data, "model": {"kind": "class", **model}}
        return from_dict(cls, {key: value for key, value in data.items() if key != "format"})


def check_format(data: Any) -> None:
    """ConfigError when `data` is not the content of a RUN/config.json of a known format."""
    if not isinstance(data, dict) or data.get("format") != RUN_FORMAT:
        raise ConfigError(
            f"format: expected {RUN_FORMAT!r}, got {data.get('format') if isinstance(data, dict) else data!r}"
        )
