"""A classifier to be trained: its classes and their sizes, and how well it names held-out images."""

from pathlib import Path

import torch

from ldit.config.classifier import ClassifierRun, ClassifierSpec
from ldit.config.kinds import AnySpec
from ldit.data.images.image_set import ImageSet
from ldit.data.samples import Samples
from ldit.errors import DataError
from ldit.log import logger
from ldit.parallel.world import World
from ldit.train.hooks import heldout_hook
from ldit.train.step import TrainState, fill_fresh
from ldit.train.tasks.classifier import ClassifierTask, class_weights
from ldit.train.tasks.subject import Surroundings
from ldit.train.trainer import Hook


class ClassifierSubject:
    """See `ldit.train.tasks.subject.Subject`. DataError when the data has no images or no classes."""

    flops_per_image = 0.0

    def __init__(self, config: ClassifierRun, out: Path, data: Samples, world: World) -> None:
        if not isinstance(data, ImageSet):
            raise DataError(f"data.path: {data.root} holds latents, a classifier is trained on images")
        if len(data.names) < 2:
            found = "images without classes" if not data.names else f"the one class {data.names[0]!r}"
            raise DataError(f"data.path: {data.root} holds {found}, a classifier tells two or more apart")
        self.config = config
        counts = world.from_rank0(lambda: _counts(data) if config.objective.balanced else [1] * len(data.names))
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
        state.world.run_on_all(lambda: fill_fresh(state, self.task))

    def resumed(self, spec: AnySpec) -> None:
        """Nothing."""

    def hooks(self, around: Surroundings) -> list[Hook]:
        """Accuracy on held-out images."""
        heldout = self.config.heldout
        if around.heldout is None:
            if heldout.every:
                logger.info("no held-out images: nothing is measured on any (data.heldout names a list)")
            return []
        return [Hook(heldout.every, heldout_hook(self.task, around.heldout, heldout.num, around))]


def _counts(data: ImageSet) -> list[int]:
    """The number of images of each class."""
    labels = torch.tensor([data.label(index) for index in range(len(data))])
    found: list[int] = torch.bincount(labels, minlength=len(data.names)).tolist()
    return found
