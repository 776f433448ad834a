"""The Task protocol: what a run trains, with its network, losses and hooks."""

import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ldit.config.kinds import AnySpec
from ldit.data.batch import Batch, Fault
from ldit.data.samples import Samples
from ldit.parallel.watchdog import Watchdog
from ldit.parallel.world import World
from ldit.training.state import TrainState


@dataclass(frozen=True)
class Hook:
    """`run` is called on every rank after every `every`-th step (0 = never) and after the last. Its result goes into
    metrics.jsonl."""

    every: int
    run: Callable[[TrainState], dict[str, Any] | None]
    after_save: bool = False
    """Run it after the step is saved, if it is one to be saved: it takes long and gives no values."""


@dataclass(frozen=True)
class HookContext:
    """What hooks are made from."""

    out: Path
    """The run directory."""
    world: World
    data: Samples
    heldout: Samples | None
    watchdog: Watchdog = field(repr=False)
    skip: Callable[[list[Fault], int], None] = lambda faults, step: None
    """Records samples that could not be read, with the step; called on the main process."""
    received: list[signal.Signals] = field(default_factory=list, repr=False)
    """The signal that this process has received, if any: the run is about to stop."""


class Task(Protocol):
    """What a run trains. Every rank builds the same one from configuration and data, before the run directory is
    touched, so that mistakes in those are found first."""

    @property
    def spec(self) -> AnySpec:
        """The content of a committed step's config.json, without its training record."""
        ...

    @property
    def flops_per_image(self) -> float:
        """FLOPs of a forward and backward pass; 0 = not counted."""
        ...

    def describe(self) -> str:
        """A few words for the log: parameters and the like."""
        ...

    def record(self) -> dict[str, str | None]:
        """Further values that must be the same on resume, besides data and configuration."""
        ...

    def network(self) -> nn.Module:
        """The network, on the meta device."""
        ...

    def initial(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The initial value of the full parameter `name`, fp32 on the CPU."""
        ...

    def begin(self, state: TrainState) -> None:
        """Fill the state of a new run with fresh weights or those of another checkpoint; every rank fills its part."""
        ...

    def resumed(self, spec: AnySpec) -> None:
        """Take what the configuration does not hold from the step that the run resumes from."""
        ...

    def losses(self, model: nn.Module, batch: Batch, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Per-sample values (B,) on `device`. "loss" is minimised; "time", optional, is the noise time in [0, 1]. The
        network's inputs have `dtype`."""
        ...

    def evaluate(self, model: nn.Module, batch: Batch, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Per-sample values of held-out images, by name; a name may cover only some of the samples."""
        ...

    def hooks(self, context: HookContext) -> list[Hook]:
        """The measurements between steps."""
        ...
