"""The ladder's arms: each is a recipe, most of them one change to the arm before.

Every arm trains on the same images in the same order from the same seeds. Networks have equal depth and width unless
the change is about that.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from ldit.config.model import ClassModelConfig, OriginalDiTConfig
from ldit.config.run import RunConfig
from ldit.config.sections import (
    DataConfig,
    EMAConfig,
    HeldoutConfig,
    ObjectiveConfig,
    OptimConfig,
    ParallelConfig,
    StageConfig,
    TrainConfig,
)
from ldit.config.spec import DDPMConfig, FlowConfig, PixelCodecConfig
from ldit.nn.build import forward_flops


@dataclass(frozen=True)
class Task:
    """A set of images and the budget on it. `points`: steps at which the EMA weights are measured; `path` "" is given
    on the command line."""

    name: str
    path: str
    side: int
    patch: int
    classes: int
    batch: int = 64
    steps: int = 3200
    points: tuple[int, ...] = (200, 400, 800, 1600, 2400, 3200)
    dim: int = 128
    layers: int = 6
    heads: int = 4

    @property
    def tuning_steps(self) -> int:
        """A third of the budget, rounded to the grid of points."""
        return round(self.steps / 3 / self.points[0]) * self.points[0]


TASKS = {
    task.name: task
    for task in (
        Task("fashion", "", 32, 4, 10),
        Task("emoji64", "emoji64", 64, 8, 9),
    )
}

Change = Callable[[RunConfig], RunConfig]


@dataclass(frozen=True)
class Arm:
    """`base` is the arm that `change` is applied to. `rates`: the learning rates that are tried at a third of the
    budget; a single one is used as it is. `rates_of` names another arm whose tuned rate is taken."""

    name: str
    what: str
    base: str | None
    change: Change
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    rates_of: str | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    """Keywords of sampling besides those of all arms."""


def _with(section: str, **values: object) -> Change:
    return lambda config: replace(config, **{section: replace(getattr(config, section), **values)})


def _flow(config: RunConfig) -> RunConfig:
    """Flow matching of the velocity, logit-normal times; no variance is learned. AdamW's second decay is that of the
    flow recipes."""
    return replace(
        config,
        process=FlowConfig(),
        model=replace(large(config), learn_sigma=False),
        objective=ObjectiveConfig(time_mean=0.0, time_std=1.0),
        optim=replace(config.optim, beta2=0.95),
    )


def _cooldown(config: RunConfig) -> RunConfig:
    """Linear to zero over the last 30 %, after a warm-up of 100 steps."""
    return replace(config, train=replace(config.train, warmup=100, cooldown=round(0.3 * config.train.steps)))


def _same(config: RunConfig) -> RunConfig:
    return config


def _model(**values: Any) -> Change:
    """Changes of the network."""
    return lambda config: replace(config, model=replace(large(config), **values))


def _dit(config: RunConfig) -> RunConfig:
    """The network of the original DiT."""
    return replace(config, model=original(large(config)))


def large(config: RunConfig) -> ClassModelConfig:
    """The Large-DiT of an arm."""
    assert isinstance(config.model, ClassModelConfig)
    return config.model


def _muon(config: RunConfig) -> RunConfig:
    """Chunked Muon, its iterations in bf16."""
    return replace(config, optim=replace(config.optim, kind="muon", chunked=True, precision="bf16"))


def _tokens(config: RunConfig) -> RunConfig:
    """16 tokens of the class, and one adaLN for all blocks; the parameters that it frees are two more blocks."""
    return _model(class_tokens=16, shared_adaln=True, n_layers=large(config).n_layers + 2)(config)


def _width(dim: int) -> Change:
    """Another width with heads of the same width; the tuned rate is carried over by muP."""

    def change(config: RunConfig) -> RunConfig:
        base = large(config)
        heads = base.n_heads * dim // base.dim
        optim = replace(config.optim, base_width=base.dim)
        return replace(config, model=replace(base, dim=dim, n_heads=heads), optim=optim)

    return change


def _stages(config: RunConfig) -> RunConfig:
    """60 % of the steps at half the side, with less noise."""
    return replace(config, stages=(StageConfig(config.data.image_size // 2, round(0.6 * config.train.steps), 0.5),))


ARMS = {
    arm.name: arm
    for arm in (
        Arm("published", "Large-DiT as published: eps, AdamW 1e-4, 1-D RoPE, EMA .9999 from the first step", None,
            _same, rates=(1e-4,)),
        Arm("published-tuned", "the same at the rate tuned for `ema`", "published", _same, rates_of="ema"),
        Arm("ema", "+ warm-up of the EMA", "published", _with("ema", warmup=True)),
        Arm("dit", "the original DiT, trained as `ema`", "ema", _dit),
        Arm("flow", "+ flow matching, logit-normal times", "ema", _flow),
        Arm("rope2d", "+ 2-D RoPE", "flow", _model(rope="2d")),
        Arm("cooldown", "+ warm-up and cool-down of the rate", "rope2d", _cooldown),
        Arm("muon", "+ chunked Muon", "cooldown", _muon),
        Arm("tokens", "+ 16 class tokens, shared adaLN, 2 more blocks", "muon", _tokens),
        Arm("internal", "+ internal guidance: second head, 1.4", "tokens", _model(mid_layer=2),
            rates_of="tokens", sampling={"guide": "internal", "guidance": 1.4}),
        Arm("levels", "muon + two patch levels: 4 blocks at patch 4, 2 at patch 2", "muon",
            _model(patch_size=2, fine_layers=2), rates_of="muon"),
        Arm("stages", "muon + 60 % of the steps at half the side", "muon", _stages, rates_of="muon"),
        Arm("nearest", "muon + nearest of 4 noises", "muon", _with("objective", nearest_of=4), rates_of="muon"),
        Arm("direction", "muon + velocity-direction loss", "muon", _with("objective", direction=0.5), rates_of="muon"),
        Arm("min-snr", "muon + min-SNR 5", "muon", _with("objective", min_snr=5.0), rates_of="muon"),
        Arm("values", "muon + value residuals", "muon", _model(value_residual=True), rates_of="muon"),
        Arm("head-norm", "muon + q/k norm a head", "muon", _model(qk_norm="head"), rates_of="muon"),
        Arm("no-norm", "muon without q/k norm", "muon", _model(qk_norm=False), rates_of="muon"),
        Arm("route", "muon + half of the tokens skip blocks 2 to 4", "muon",
            _with("objective", route=0.5, route_blocks=(2, 4)), rates_of="muon"),
        Arm("narrow", "cooldown at half the width, rates by muP", "cooldown", _width(64), rates_of="cooldown"),
        Arm("wide", "cooldown at twice the width, rates by muP", "cooldown", _width(256), rates_of="cooldown"),
    )
}  # fmt: skip

SIZES = ("narrow", "wide")
"""Arms of other sizes than the rest: what a larger network gains from the same images."""
ORDER = (
    ("published", "cooldown", "ema", "dit", "muon"),
    ("flow", "rope2d", "published-tuned", "tokens", "internal"),
    ("levels", "stages", "nearest", "direction", "min-snr", "values", "head-norm", "no-norm", "route"),
    SIZES,
)
"""The order of the runs, in groups: all seeds of a group come before the next. The published recipe and the likely
winner come first, then the published recipe with a warm-up of its average: at this budget the average without one is
still its start (FD 166.7 after 204,800 images, from 167.0), so that the other is the fair target."""


def configured(arm: Arm, task: Task, path: str, rate: float, seed: int, steps: int) -> RunConfig:
    """The run of an arm: the changes of its bases, then its own."""
    config = _published(task, path, rate, seed, steps)
    changes = []
    walk: Arm | None = arm
    while walk is not None:
        changes.append(walk.change)
        walk = ARMS[walk.base] if walk.base else None
    for change in reversed(changes):
        config = change(config)
    return config


def training_flops(config: RunConfig, images: float) -> float:
    """FLOPs of training on the first `images` images of a run: three times the forward passes, stage by stage."""
    total, left = 0.0, images
    for stage in config.stages:
        count = min(left, stage.steps * config.train.batch_size)
        total, left = total + count * _image_flops(config, stage.size), left - count
    return total + left * _image_flops(config, config.model.input_size)


def _image_flops(config: RunConfig, side: int) -> float:
    """FLOPs of training on an image of this size: three forward passes, with routed tokens and the second head."""
    forward = float(forward_flops(config.model, side, side))
    if not isinstance(config.model, ClassModelConfig):
        return 3.0 * forward
    model, tokens = config.model, (side // config.model.side_unit) ** 2
    if config.objective.route:
        first, last = config.objective.route_blocks
        kept = round(tokens * (1 - config.objective.route))
        forward -= (last - first + 1) * (_block_flops(model, tokens) - _block_flops(model, kept))
    if model.mid_layer:
        patch, dim = model.side_unit, model.dim
        forward += 2 * (tokens * patch**2 * dim * model.out_channels + 2 * dim * model.cond_dim)
    return 3.0 * forward


def _block_flops(model: ClassModelConfig, tokens: int) -> float:
    """FLOPs of one block over so many tokens, without its adaLN."""
    dim, kv = model.dim, model.kv_heads * model.head_dim
    return 2 * (tokens * (2 * dim * dim + 2 * dim * kv + 3 * dim * model.ffn_hidden) + 2 * tokens**2 * dim)


def _published(task: Task, path: str, rate: float, seed: int, steps: int) -> RunConfig:
    """The recipe of Large-DiT at the task's size, with its EMA without warm-up."""
    return RunConfig(
        model=ClassModelConfig(
            patch_size=task.patch,
            in_channels=3,
            dim=task.dim,
            n_layers=task.layers,
            n_heads=task.heads,
            multiple_of=32,
            learn_sigma=True,
            qk_norm=True,
            rope="raster",
            input_size=task.side,
            num_classes=task.classes,
        ),
        process=DDPMConfig(),
        codec=PixelCodecConfig(),
        data=DataConfig(path or task.path, task.side, flip=False),
        train=TrainConfig(
            steps=steps,
            batch_size=task.batch,
            lr=rate,
            seed=seed,
            precision="bf16",
            log_every=50,
            checkpoint_every=task.points[0],
            keep=1,
            keep_every=task.points[0],
            attention_every=0,
        ),
        optim=OptimConfig(),
        parallel=ParallelConfig(compile=True),
        ema=EMAConfig(0.9999, warmup=False),
        heldout=HeldoutConfig(every=task.points[0], num=512),
    )


def original(config: ClassModelConfig) -> OriginalDiTConfig:
    """The original DiT of the same depth, width and heads; its MLP is four times as wide."""
    return OriginalDiTConfig(
        input_size=config.input_size,
        patch_size=config.patch_size,
        in_channels=config.in_channels,
        hidden_size=config.dim,
        depth=config.n_layers,
        num_heads=config.n_heads,
        class_dropout_prob=config.class_dropout_prob,
        num_classes=config.num_classes,
        learn_sigma=config.learn_sigma,
    )
