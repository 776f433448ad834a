"""A classifier trained by ldit as an extractor: features and logits."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ldit.checkpoint.classifier import ClassifierSource, holds_classifier, open_classifier_step
from ldit.errors import EvaluationError, SourceError
from ldit.eval.features import Extractor, Features
from ldit.nn.classifier import ClassifierNetwork
from ldit.precision import unrounded
from ldit.storage.tensors import assign


class ClassifierExtractor:
    """See `ldit.eval.features.Extractor`. `classes` are the names of the logits."""

    name = "classifier"
    metric = "fd_classifier"
    spatial = 0

    def __init__(self, source: ClassifierSource, device: torch.device) -> None:
        spec = source.spec
        with torch.device("meta"):
            network = ClassifierNetwork(spec.model, len(spec.names))
        assign(network, source.tensors(), str(source.path), device, torch.float32)
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._network, self._side, self._device = network.eval().requires_grad_(False), spec.image_size, device
        self.classes, self.width = spec.names, spec.model.widths[-1]
        self.fingerprint = source.fingerprint()
        self.resize = f"{self._side}x{self._side}, bilinear with antialiasing"

    def __call__(self, images: Tensor) -> Features:
        """uint8 (B, 3, H, W) of any size -> pool (B, D) and logits (B, K), fp32 on the extractor's device;
        EvaluationError for anything else."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise EvaluationError(
                f"a classifier takes uint8 images (B, 3, H, W), got {images.dtype} {tuple(images.shape)}"
            )
        with torch.inference_mode(), unrounded():
            images = images.to(self._device).float() / 127.5 - 1
            if images.shape[2:] != (self._side, self._side):
                size = (self._side, self._side)
                images = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
            pool = self._network.features(images)
            return Features(pool, logits=self._network.head(pool))


def open_classifier(source: Path, device: torch.device) -> Extractor:
    """An extractor with the EMA weights of a step, or of the latest valid step of a run; EvaluationError when `source`
    is damaged or not a classifier."""
    try:
        if not holds_classifier(source):
            raise EvaluationError(f"{source} is not a classifier's run or a step of one (ldit train extractor-small)")
        return ClassifierExtractor(open_classifier_step(source), device)
    except SourceError as error:
        raise EvaluationError(str(error)) from None
