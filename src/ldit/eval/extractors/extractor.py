"""Opens extractors by name, with the fingerprint and resize rule that reports state."""

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
from ldit.eval.extractors.protocol import protocol_of
from ldit.eval.features import Extractor, Features

INCEPTION, LITE0 = "inception", "efficientnet-lite0"
_SLICE = 4  # images at a time on the CPU: the activations of more do not fit its cache
_KEPT = 31 << 20  # bytes of the block that raises glibc's threshold


@dataclass(frozen=True)
class NetworkExtractor:
    """A network that resizes its inputs, with its description (see `ldit.eval.features.Extractor`)."""

    name: str
    fingerprint: str
    resize: str
    width: int
    spatial: int
    metric: str
    network: Callable[[Tensor], dict[str, Tensor]]
    logits: str
    device: torch.device
    protocol: str | None = None

    def __call__(self, images: Tensor) -> Features:
        rows = _SLICE if self.device.type == "cpu" else max(len(images), 1)
        parts = [self.network(part) for part in images.to(self.device).split(rows)]
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return Features(joined["pool"], joined.get("spatial"), joined[self.logits])


def open_named(
    name: str, inception_weights: Path | None, device: torch.device, protocol: str | None = None
) -> Extractor:
    """The extractor that a request or a run names; `inception_weights` and `protocol` are for Inception only."""
    for given, what in ((inception_weights, "inception_weights"), (protocol, "protocol")):
        if given is not None and name != INCEPTION:
            raise EvaluationError(f"{what}: is for {INCEPTION}, the extractor is {name}")
    return open_extractor(name, inception_weights, device, protocol)


def open_extractor(name: str, weights: Path | None, device: torch.device, protocol: str | None = None) -> Extractor:
    """The extractor "inception", "efficientnet-lite0", or a classifier trained by ldit, by its folder or run.

    `weights` is the weight file of the first two, searched for if None; `protocol` is Inception's (`protocol_of`).
    Their networks compute in fp32 without TF32.
    EvaluationError for an unknown name, and for weights that are missing or not the published ones.
    """
    if device.type == "cpu":
        _keep_freed_memory()
    if name == INCEPTION:
        rule = protocol_of(protocol)
        path = find_weights(weights)
        digest = check_weights(path)
        network = inception.load_inception(path, check_hash=False, protocol=rule).to(device)
        return NetworkExtractor(
            name, digest, rule.resize, inception.WIDTH, inception.SPATIAL, "fid", network, "logits_unbiased", device,
            rule.name,
        )  # fmt: skip
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
    """Let this process keep the memory of activations between forward passes, at most 64 MiB.

    glibc maps each block above a threshold separately and unmaps it when it is freed, so every pass has page faults for
    its activations: a quarter of EfficientNet-Lite0's time. The threshold rises to the size of the largest such block
    that was freed, up to 32 MiB (mallopt(3), M_MMAP_THRESHOLD). With other C libraries this has no effect.
    """
    torch.empty(_KEPT, dtype=torch.uint8)
