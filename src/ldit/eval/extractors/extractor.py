"""Extractors by name, each with the words and hashes that a metric is reported with."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ldit.errors import EvaluationError
from ldit.eval.extractors import inception, lite0
from ldit.eval.extractors.classifier import open_classifier
from ldit.eval.extractors.inception_weights import check_weights, find_weights
from ldit.eval.features import Extractor, Features

INCEPTION, LITE0 = "inception", "efficientnet-lite0"
_SLICE = 4  # images at once on the CPU: activations of more leave the cache
_KEPT = 31 << 20  # bytes


@dataclass(frozen=True)
class NetworkExtractor:
    """A network that resizes by itself, with its name, hash and resize rule (see `ldit.eval.features.Extractor`)."""

    name: str
    fingerprint: str
    resize: str
    width: int
    spatial: int
    metric: str
    network: Callable[[Tensor], dict[str, Tensor]]
    logits: str
    device: torch.device

    def __call__(self, images: Tensor) -> Features:
        rows = _SLICE if self.device.type == "cpu" else max(len(images), 1)
        parts = [self.network(part) for part in images.to(self.device).split(rows)]
        whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return Features(whole["pool"], whole.get("spatial"), whole[self.logits])


def open_named(name: str, inception_weights: Path | None, device: torch.device) -> Extractor:
    """The extractor that a request or a run names; `inception_weights` is the file of Inception alone."""
    if inception_weights is not None and name != INCEPTION:
        raise EvaluationError(f"inception_weights: the extractor is {name}")
    return open_extractor(name, inception_weights, device)


def open_extractor(name: str, weights: Path | None, device: torch.device) -> Extractor:
    """The extractor "inception", "efficientnet-lite0", or one trained here, by its folder or run.

    `weights` is the file of the first two, looked for where it is None. Their networks compute in fp32 without TF32.
    EvaluationError for an unknown name, and for weights that are missing or not the published ones.
    """
    if device.type == "cpu":
        _keep_freed_memory()
    if name == INCEPTION:
        path = find_weights(weights)
        digest = check_weights(path)
        network = inception.load_inception(path, check_hash=False).to(device)
        widths = (inception.WIDTH, inception.SPATIAL)
        return NetworkExtractor(name, digest, inception.RESIZE, *widths, "fid", network, "logits_unbiased", device)
    if name == LITE0:
        small = lite0.load_lite0(weights).to(device)
        return NetworkExtractor(name, lite0.SHA256, lite0.RESIZE, lite0.WIDTH, 0, f"fd_{name}", small, "logits", device)
    if not os.path.exists(os.path.expanduser(name)):  # Path("") is the working directory
        raise EvaluationError(
            f"extractor: expected {INCEPTION}, {LITE0}, or the folder of a trained classifier, got {name!r}"
        )
    if weights is not None:
        raise EvaluationError(f"{weights}: a trained classifier has its weights in its own folder, {name}")
    return open_classifier(Path(name).expanduser(), device)


def _keep_freed_memory() -> None:
    """Let this process keep the memory of activations between forward passes, 64 MiB at most.

    glibc takes blocks beyond a threshold from the system one by one and gives them back at once, so that every pass
    faults its activations in anew: a quarter of EfficientNet-Lite0's time. The threshold follows the largest such block
    that was freed, up to 32 MiB (mallopt(3), M_MMAP_THRESHOLD). Elsewhere this does nothing.
    """
    torch.empty(_KEPT, dtype=torch.uint8)
