"""What a run trains, as the flow of training needs it: a task, and all around it that differs by kind."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from ldit.config.kinds import AnySpec
from ldit.data.batch import Fault
from ldit.data.samples import Samples
from ldit.parallel.watchdog import Watchdog
from ldit.parallel.world import World
from ldit.train.step import TrainState
from ldit.train.tasks.task import Task
from ldit.train.trainer import Hook


@dataclass(frozen=True)
class Surroundings:
    """What hooks are made with."""

    world: World
    data: Samples
    heldout: Samples | None
    watchdog: Watchdog = field(repr=False)
    skip: Callable[[list[Fault], int], None] = lambda faults, step: None
    """Takes samples that could not be read, and the step, on the first process."""


class Subject(Protocol):
    """A diffusion model, an autoencoder or a classifier about to be trained. Made on every process alike, before the
    run's directory is touched: making one finds every mistake that can be found from the configuration and the data."""

    @property
    def task(self) -> Task: ...

    @property
    def flops_per_image(self) -> float:
        """Of a forward and backward pass; 0 where nobody counted."""
        ...

    def describe(self) -> str:
        """A few words for the log: parameters and the like."""
        ...

    def record(self) -> dict[str, str]:
        """What must stay the same when a run goes on, besides the images and the configuration."""
        ...

    def begin(self, state: TrainState) -> None:
        """The numbers that a new run starts with; all processes call it together."""
        ...

    def resumed(self, spec: AnySpec) -> None:
        """What the step that the run goes on from says of itself, and the configuration does not."""
        ...

    def hooks(self, around: Surroundings) -> list[Hook]:
        """What is done beside the steps."""
        ...
