"""What a run trains: a Task with its network, losses and hooks. Diffusion is one kind."""

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
from ldit.train.state import TrainState


@dataclass(frozen=True)
class Hook:
    """Called on every rank after a step that `every` divides, and after the last one; its result goes into
    metrics.jsonl."""

    every: int
    run: Callable[[TrainState], dict[str, Any] | None]


@dataclass(frozen=True)
class HookContext:
    """What hooks are made with."""

    out: Path
    """The run directory."""
    world: World
    data: Samples
    heldout: Samples | None
    watchdog: Watchdog = field(repr=False)
    skip: Callable[[list[Fault], int], None] = lambda faults, step: None
    """Takes samples that could not be read, and the step, on the main process."""


class Task(Protocol):
    """Something to be trained. It is made on every rank alike before the run directory is touched, from configuration
    and data, so that making one finds every mistake that can be found from those."""

    @property
    def spec(self) -> AnySpec:
        """The content of a committed step's config.json, but for its training record."""
        ...

    @property
    def flops_per_image(self) -> float:
        """FLOPs of a forward and backward pass; 0 where they are not counted."""
        ...

    def describe(self) -> str:
        """A few words for the log: parameters and the like."""
        ...

    def record(self) -> dict[str, str]:
        """What must stay the same on resume besides the data and the configuration."""
        ...

    def network(self) -> nn.Module:
        """The network, on the meta device."""
        ...

    def initial(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The whole parameter `name` of a fresh network, fp32 on the CPU."""
        ...

    def begin(self, state: TrainState) -> None:
        """Fill the state of a new run: fresh weights, or those of another checkpoint. Every rank fills its part."""
        ...

    def resumed(self, spec: AnySpec) -> None:
        """Take from the step that the run resumes from what the configuration does not hold."""
        ...

    def losses(self, model: nn.Module, batch: Batch, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Per-sample values (B,) on `device`: "loss" is what is minimised, "time" in [0, 1], where there is one, how
        noisy the sample was. The network is given inputs in `dtype`."""
        ...

    def evaluate(self, model: nn.Module, batch: Batch, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Per-sample values of held-out images, by name; a name may cover only some of the samples."""
        ...

    def hooks(self, context: HookContext) -> list[Hook]:
        """What is measured between steps."""
        ...
