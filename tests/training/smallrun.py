"""Runs of some milliseconds a step, over images that need no files: for tests that take hundreds of steps."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from runs import ALONE
from torch import Tensor

from ldit.config.recipes.registry import recipe
from ldit.config.run import RunConfig
from ldit.config.spec import ClassConditionerConfig, FlowConfig, ModelSpec
from ldit.data.images.image_set import ImageSet
from ldit.data.loader import Loader
from ldit.parallel.watchdog import Watchdog
from ldit.training.state import TrainState
from ldit.training.step import Outcome, fill_fresh, new_state
from ldit.training.tasks.diffusion import DiffusionTask
from ldit.training.trainer import Trainer

CLASSES = 3
SIDE = 8
_SMALL = {
    "model.dim": 16, "model.n_layers": 1, "model.n_heads": 2, "model.multiple_of": 16, "model.input_size": SIDE,
    "model.num_classes": CLASSES, "data.image_size": SIDE, "data.workers": 0, "train.batch_size": 8,
    "train.steps": 24, "train.attention_every": 0, "train.sample_every": 0, "train.async_save": False,
    "train.log_every": 1, "train.checkpoint_every": 0, "train.keep": 0, "heldout.every": 0,
}  # fmt: skip


class Images(ImageSet):
    """Images of coloured noise, the same on every machine (numpy's legacy generator is frozen)."""

    names: tuple[str, ...] = tuple("abc")
    root = Path("pictures-in-memory")
    size = SIDE

    def __init__(self, count: int = 20) -> None:
        random = np.random.RandomState(0)
        self.num_before_cap = count
        self.images = random.randint(0, 256, (count, SIDE, SIDE, 3)).astype(np.uint8)

    def __len__(self) -> int:
        return self.num_before_cap

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[index], index % CLASSES

    def where(self, index: int) -> str:
        return f"image {index}"

    def fingerprint(self) -> str:
        return f"{self.num_before_cap} images of noise"


def changed(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """`config` with other values at dotted keys; the changes of a section are made together."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    whole = {section: values[""] for section, values in sections.items() if "" in values}
    parts = {s: replace(getattr(config, s), **v) for s, v in sections.items() if "" not in v}
    return replace(config, **whole, **parts)


def small(changes: Mapping[str, Any] | None = None, flow: str = "") -> RunConfig:
    """A network of some thousand parameters; `flow` = "v" or "x0" instead of DDPM."""
    config = changed(recipe("tiny-cpu"), _SMALL)
    if flow:
        config = changed(config, {"process": FlowConfig(prediction=flow), "model.learn_sigma": False})  # type: ignore[arg-type]
    return changed(config, changes or {})


def begin(config: RunConfig, count: int = 20) -> tuple[TrainState, DiffusionTask, Loader]:
    """A fresh state, its task and its loader over `count` images."""
    data = Images(count)
    spec = ModelSpec(config.model, config.process, config.codec, ClassConditionerConfig(data.names))
    task = DiffusionTask(config, spec)
    state = new_state(config, task, ALONE)
    fill_fresh(state, task)
    train = config.train
    return state, task, Loader(data, train.batch_size, train.seed, config.data.flip, config.data.workers)


def tensors(state: TrainState) -> dict[str, Tensor]:
    """Copies of every tensor of a state, by name: masters, the network's own, averages, optimiser."""
    found = dict(zip([f"master {n}" for n in state.weights.names], state.weights.masters, strict=True))
    found |= {f"network {name}": p for name, p in state.weights.model.named_parameters()}
    for track_name, track in state.averages.tracks.items():
        named = zip(state.weights.names, track.values, strict=True)
        found |= {f"{track_name} {name}": value for name, value in named}
    found |= {f"optimizer {name}": value for name, _, value in state.optimizer.state()}
    return {name: value.detach().clone() for name, value in found.items()}


def numbers(state: TrainState) -> dict[str, Any]:
    """All the rest that a state holds."""
    return {
        "step": state.step, "updates": state.updates, "offset": state.offset,
        "guard": state.guard.to_json(), "scaler": state.scaler.to_json(),
    }  # fmt: skip


def unequal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors whose bits differ, or that are in one only."""
    return [name for name in a.keys() | b.keys() if name not in a or name not in b or not same_bits(a[name], b[name])]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal numbers, zeros of either sign told apart and NaNs not."""
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.reshape(-1).view(words[a.element_size()]), b.reshape(-1).view(words[b.element_size()]))


@dataclass
class Run:
    """A Trainer with what it wrote, and the positions it was given."""

    trainer: Trainer
    records: list[dict[str, Any]] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)

    @property
    def state(self) -> TrainState:
        return self.trainer.state


def trainer(config: RunConfig, out: Path, task: Any = None, hooks: Sequence[Any] = (), count: int = 20) -> Run:
    """A Trainer over in-memory images that keeps its records. `task(config, spec)` makes another task."""
    state, plain, loader = begin(config, count)
    made = plain if task is None else task(config, plain.spec)
    run = Run.__new__(Run)

    def batches(first: int, last: int, offset: int) -> Iterator[Any]:
        for batch in loader.from_step(first, last, offset):
            run.positions.append(batch.positions[0])
            yield batch

    run.records, run.positions = [], []
    watchdog = Watchdog(ALONE, 600.0)
    run.trainer = Trainer(config, made, state, batches, out, run.records.append, watchdog=watchdog, hooks=hooks)
    return run


def values_of(outcome: Outcome) -> dict[str, str]:
    """An outcome's numbers in full, NaN included."""
    return {name: float(value).hex() for name, value in outcome.values.items()} | {"fault": outcome.fault}


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums of one thread have one order, whatever the machine's number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
