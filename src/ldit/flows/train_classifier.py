"""A classifier to be trained: its classes and their sizes, and how well it names held-out pictures."""

from pathlib import Path

import torch

from ldit.config.classifier import ClassifierRun, ClassifierSpec
from ldit.config.kinds import AnySpec
from ldit.data.picture_set import PictureSet
from ldit.data.samples import Samples
from ldit.errors import DataError
from ldit.flows.hooks import heldout_hook
from ldit.flows.subject import Surroundings
from ldit.log import logger
from ldit.parallel.world import World
from ldit.train.classifier_task import ClassifierTask, class_weights
from ldit.train.step import TrainState, fill_fresh
from ldit.train.trainer import Hook


class ClassifierSubject:
    """See `ldit.flows.subject.Subject`. DataError when the data has no pictures or no classes."""

    flops_per_image = 0.0

    def __init__(self, config: ClassifierRun, out: Path, data: Samples, world: World) -> None:
        if not isinstance(data, PictureSet):
            raise DataError(f"data.path: {data.root} holds latents, a classifier is trained on pictures")
        if len(data.names) < 2:
            found = "pictures without classes" if not data.names else f"the one class {data.names[0]!r}"
            raise DataError(f"data.path: {data.root} holds {found}, a classifier tells two or more apart")
        self.config = config
        counts = world.from_first(lambda: _counts(data) if config.objective.balanced else [1] * len(data.names))
        weights = class_weights(torch.tensor(counts), config.objective.balanced)
        self.task = ClassifierTask(config, ClassifierSpec(config.model, config.data.image_size, data.names), weights)
        self.parameters = sum(p.numel() for p in self.task.network().parameters())

    def describe(self) -> str:
        return f"{self.parameters:,} parameters, {self.config.model.widths[-1]} features"

    def record(self) -> dict[str, str]:
        """Nothing."""
        return {}

    def begin(self, state: TrainState) -> None:
        """Fresh weights."""
        state.world.agreed(lambda: fill_fresh(state, self.task))

    def resumed(self, spec: AnySpec) -> None:
        """Nothing."""

    def hooks(self, around: Surroundings) -> list[Hook]:
        """Accuracy on held-out pictures."""
        heldout = self.config.heldout
        if around.heldout is None:
            if heldout.every:
                logger.info("no held-out pictures: nothing is measured on any (data.heldout names a list)")
            return []
        return [Hook(heldout.every, heldout_hook(self.task, around.heldout, heldout.num, around))]


def _counts(data: PictureSet) -> list[int]:
    """The number of pictures of each class."""
    labels = torch.tensor([data.label(index) for index in range(len(data))])
    found: list[int] = torch.bincount(labels, minlength=len(data.names)).tolist()
    return found
