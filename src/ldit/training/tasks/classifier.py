"""The task of training an image classifier."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldit.config.classifier import ClassifierRun, ClassifierSpec
from ldit.config.experiment import Experiment
from ldit.config.kinds import AnySpec
from ldit.data.batch import Batch
from ldit.data.images.image_set import ImageSet
from ldit.data.samples import Samples
from ldit.errors import DataError
from ldit.log import logger
from ldit.nn.classifier import ClassifierNetwork
from ldit.readable import count
from ldit.rng import generator
from ldit.training.hooks import heldout_hook
from ldit.training.state import TrainState
from ldit.training.step import fill_fresh
from ldit.training.tasks.augment import augment, keep_mask
from ldit.training.tasks.inputs import to_device
from ldit.training.tasks.task import Hook, HookContext


class ClassifierTask:
    """Cross-entropy on augmented images. Augmentation and dropout of a sample depend on (seed, its position) alone.
    `weights` (K,): the weight of each class in the loss."""

    flops_per_image = 0.0

    def __init__(self, config: ClassifierRun, spec: ClassifierSpec, weights: Tensor) -> None:
        self.config, self.spec, self.weights = config, spec, weights
        self.seed, self.objective = config.train.seed, config.objective

    def describe(self) -> str:
        parameters = sum(p.numel() for p in self.network().parameters())
        return f"{count(parameters)} parameters, {self.config.model.widths[-1]} features"

    def record(self) -> dict[str, str | None]:
        """Nothing besides data and configuration."""
        return {}

    def network(self) -> ClassifierNetwork:
        with torch.device("meta"):
            return ClassifierNetwork(self.spec.model, len(self.spec.names))

    def initial(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Normal weights of deviation sqrt(2 / fan_in) (He et al. 2015), a tenth of it in the head; biases 0; norm
        scales 1, but 0 at the end of a residual branch (Goyal et al. 2017), so that a fresh block equals its
        shortcut."""
        if len(shape) == 1:
            return torch.ones(shape) if name.endswith("weight") and "norm2" not in name else torch.zeros(shape)
        deviation = (2 / torch.Size(shape[1:]).numel()) ** 0.5 * (0.1 if name.startswith("head") else 1.0)
        return torch.randn(shape, generator=generator(self.seed, "init", 0, name)) * deviation

    def begin(self, state: TrainState) -> None:
        """Fresh weights."""
        fill_fresh(state, self)

    def resumed(self, spec: AnySpec) -> None:
        """Nothing to take: the configuration holds everything."""

    def losses(self, model: nn.Module, batch: Batch, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Per sample (B,): "loss", the weighted cross-entropy in nats with smoothed targets, and "train_accuracy", 1 if
        the augmented image is classified correctly."""
        images, labels, keep = to_device(batch.inputs, device), to_device(batch.labels, device), None
        if self.objective.augment:
            images = augment(images, batch.positions, self.seed)
        if self.objective.dropout:
            width = self.spec.model.widths[-1]
            keep = to_device(keep_mask(batch.positions, self.seed, width, self.objective.dropout), device).to(dtype)
        logits = model(images.to(dtype), keep).float()
        smoothing = self.objective.label_smoothing
        loss = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
        right = (logits.argmax(1) == labels).float()
        return {"loss": loss * to_device(self.weights, device)[labels], "train_accuracy": right}

    def evaluate(self, model: nn.Module, batch: Batch, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Without augmentation: "accuracy", 0 or 1, and "cross_entropy" in nats without weights or smoothing."""
        labels = to_device(batch.labels, device)
        logits = model(to_device(batch.inputs, device).to(dtype), None).float()
        right = (logits.argmax(1) == labels).float()
        return {"accuracy": right.cpu(), "cross_entropy": F.cross_entropy(logits, labels, reduction="none").cpu()}

    def hooks(self, context: HookContext) -> list[Hook]:
        """Accuracy on held-out images."""
        heldout = self.config.heldout
        if context.heldout is None:
            if heldout.every:
                logger.info("no held-out images: no accuracy is measured (data.heldout names a list)")
            return []
        return [Hook(heldout.every, heldout_hook(self, context.heldout, heldout.num, context))]


def open_classifier(experiment: Experiment, data: Samples, device: torch.device) -> ClassifierTask:
    """The task of a run on `data`; DataError when it has no images or fewer than two classes."""
    config = experiment.config
    assert isinstance(config, ClassifierRun)
    if not isinstance(data, ImageSet):
        raise DataError(f"data.path: {data.root} holds latents, a classifier is trained on images")
    if len(data.names) < 2:
        content = "images without classes" if not data.names else f"only the class {data.names[0]!r}"
        raise DataError(f"data.path: {data.root} holds {content}, a classifier needs two or more classes")
    counts = _counts(data) if config.objective.balanced else [1] * len(data.names)
    weights = class_weights(torch.tensor(counts), config.objective.balanced)
    return ClassifierTask(config, ClassifierSpec(config.model, config.data.image_size, data.names), weights)


def _counts(data: ImageSet) -> list[int]:
    """The number of images of each class."""
    labels = torch.tensor([data.label(index) for index in range(len(data))])
    counts: list[int] = torch.bincount(labels, minlength=len(data.names)).tolist()
    return counts


def class_weights(counts: Tensor, balanced: bool) -> Tensor:
    """Loss weights (K,) fp32 from the number of images of each class (K,): 1, or if `balanced` inverse to the number,
    with mean 1 over all images. A class without images has weight 0."""
    if not balanced:
        return torch.ones(len(counts))
    occurs = counts > 0
    return torch.where(occurs, counts.sum() / (occurs.sum() * counts.clamp(min=1)), 0.0).float()
