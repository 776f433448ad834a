"""What the ladder measures of a checkpoint, against features of real images that are computed once.

1,000 images with balanced labels and seeds 0 … 999, without guidance; an arm with guidance of its own is measured with
it besides. Distances are Fréchet distances in 64 principal
components fixed on the reference, and kernel distances, in the features of two networks that no arm has seen:
EfficientNet-Lite0 (ImageNet) and a classifier of the set itself (`ladder.py classifier`). The neighbour ratio is the
mean distance of samples to their nearest training image over that of held-out images, in the classifier's features;
well below 1 means memorised.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ladder_arms import Task
from safetensors.torch import load_file, save_file
from torch import Tensor

import ldit
from ldit.codecs.pixels import to_uint8
from ldit.data.images.image_set import ImageSet
from ldit.data.source import open_data
from ldit.eval.extractors.extractor import LITE0, open_extractor
from ldit.eval.features import Extractor
from ldit.eval.metrics.components import Components, principal_components
from ldit.eval.metrics.frechet import frechet_distance
from ldit.eval.metrics.kernel import kernel_distance
from ldit.eval.metrics.moments import Moments

SAMPLES, COMPONENTS, BATCH = 1000, 64, 250
MOST_REFERENCES = 5000
SAMPLER: dict[str, Any] = {"solver": "unipc2", "grid": "karras", "steps": 20, "guidance": 1.0}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Side:
    """An extractor, and the reference in its features: rows (M, D), components, moments in them."""

    extractor: Extractor
    rows: Tensor
    axes: Components
    target: tuple[Tensor, Tensor]


class Judge:
    """Measures images of a task. Features of real images are kept in `work`, under the extractors' fingerprints."""

    def __init__(self, task: Task, path: str, classifier: Path, work: Path) -> None:
        self.task, self.work = task, work
        train, heldout = open_data(path or task.path, task.side)
        assert heldout is not None
        self.sides: dict[str, Side] = {}
        for name, source in (("lite0", LITE0), ("classifier", str(classifier))):
            extractor = open_extractor(source, None, CPU)
            rows = self._real(extractor, train, f"{name}-reference", spread(len(train), MOST_REFERENCES))
            moments = _moments(rows)
            axes = principal_components(moments.mean, moments.covariance, COMPONENTS)
            self.sides[name] = Side(extractor, rows, axes, axes.project_moments(moments.mean, moments.covariance))
        own = self.sides["classifier"].extractor
        self.training = self._real(own, train, "classifier-training", range(len(train)))
        self.heldout = {
            name: self._real(side.extractor, heldout, f"{name}-heldout", spread(len(heldout), SAMPLES))
            for name, side in self.sides.items()
        }
        self.heldout_nearest = self._nearest(self.heldout["classifier"])

    def fingerprints(self) -> dict[str, str]:
        return {name: side.extractor.fingerprint[:12] for name, side in self.sides.items()}

    def floor(self) -> dict[str, float]:
        """The measures of held-out real images: no model is expected below."""
        return self._compared(self.heldout)

    def of_images(self, images: Tensor) -> dict[str, float]:
        """The measures of images, uint8 (N, 3, H, W)."""
        return self._compared({name: _features(side.extractor, images) for name, side in self.sides.items()})

    def _compared(self, rows: dict[str, Tensor]) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, side in self.sides.items():
            own = _moments(side.axes.project(rows[name]))
            found[f"fd_{name}"] = frechet_distance(own.mean, own.covariance, *side.target)
            found[f"kid_{name}"] = kernel_distance(rows[name], side.rows, subsets=10).mean
        found["neighbours"] = self._nearest(rows["classifier"]) / self.heldout_nearest
        return found

    def _nearest(self, rows: Tensor) -> float:
        return float(torch.cdist(rows, self.training).amin(1).mean())

    def _real(self, extractor: Extractor, images: ImageSet, name: str, chosen: range) -> Tensor:
        file = self.work / f"{self.task.name}-{name}-{extractor.fingerprint[:12]}-{len(chosen)}.safetensors"
        if not file.exists():
            rows = [_features(extractor, pixels(images, range(a, min(a + 500 * chosen.step, chosen.stop), chosen.step)))
                    for a in range(chosen.start, chosen.stop, 500 * chosen.step)]  # fmt: skip
            half = file.with_suffix(".half")
            save_file({"rows": torch.cat(rows)}, half)
            half.replace(file)
        return load_file(file)["rows"]


def spread(count: int, most: int) -> range:
    """At most `most` indices, evenly spread."""
    step = -(-count // most)
    return range(0, count, step)


def pixels(images: ImageSet, chosen: range) -> Tensor:
    """uint8 (N, 3, S, S)."""
    return torch.from_numpy(np.stack([images[i][0] for i in chosen])).permute(0, 3, 1, 2).contiguous()


def _features(extractor: Extractor, images: Tensor) -> Tensor:
    return torch.cat([extractor(part).pool.float() for part in images.split(BATCH)])


def _moments(rows: Tensor) -> Moments:
    moments = Moments(rows.shape[1])
    moments.add(rows)
    return moments


def sampled(step: Path, task: Task, keywords: dict[str, Any]) -> tuple[Tensor, float]:
    """1,000 images of a step's EMA weights, uint8 (N, 3, S, S), and the seconds they took."""
    pipe = ldit.load(step)
    labels = [k % task.classes for k in range(SAMPLES)]
    began = time.perf_counter()
    images = to_uint8(pipe.sample(labels, seed=0, output_type="tensor", batch_size=BATCH, **keywords))
    return images, time.perf_counter() - began
