"""An extractor that is a few numbers of an image, and sets of images on the disk."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldit.config.requests.evaluate import EvaluateRequest
from ldit.eval.evaluate import check_evaluation, evaluate_with
from ldit.eval.features import Extractor, Features
from ldit.parallel.world import World

WIDTH = 6
SIDE = 8


class Stub:
    """Means of the two halves of each colour, through a fixed mixing, so that features are correlated."""

    name, metric = "stub", "fd_stub"
    fingerprint, resize, width, spatial = "0" * 64, "none", WIDTH, 0

    def __init__(self, classes: tuple[str, ...] = ()) -> None:
        self.classes = classes
        self.seen = 0
        self.mixing = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(3))

    def __call__(self, images: Tensor) -> Features:
        assert images.dtype == torch.uint8 and images.shape[1] == 3
        self.seen += len(images)
        half = images.shape[-1] // 2
        x = images.float() / 255
        means = torch.cat([x[..., :half].mean((2, 3)), x[..., half:].mean((2, 3))], 1)
        rows = means @ self.mixing
        return Features(rows, logits=rows[:, :3] * 20)


class Inceptive(Stub):
    """With all that Inception has."""

    name, metric, spatial = "inception", "fid", 4

    def __call__(self, images: Tensor) -> Features:
        found = super().__call__(images)
        return Features(found.pool, found.pool[:, :4] * 2, found.logits)


def noise(count: int, seed: int, side: int = SIDE, low: int = 0) -> np.ndarray:
    """(N, S, S, 3) uint8, each image about a colour of its own."""
    random = np.random.RandomState(seed)
    base = random.randint(low, 200, (count, 1, 1, 3))
    return (base + random.randint(0, 56, (count, side, side, 3))).astype(np.uint8)


def folder(root: Path, images: np.ndarray, names: tuple[str, ...] = ()) -> Path:
    """Images in a folder; in class folders by turns where there are names."""
    for k, image in enumerate(images):
        place = root / names[k % len(names)] if names else root
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{k:04d}.png")
    return root


def job(source: str | Path, reference: str | Path, batch: int = 5, **changes: Any) -> EvaluateRequest:
    given = {"batch_size": batch, "device": "cpu", **changes}
    return EvaluateRequest(source=str(source), reference=str(reference), **given)


def found(one: EvaluateRequest, extractor: Extractor | None = None) -> dict[str, Any]:
    """The report of one process."""
    check_evaluation(one)
    return evaluate_with(one, extractor or Stub(), World(torch.device("cpu")))


def rows_of(images: np.ndarray) -> np.ndarray:
    return Stub()(torch.from_numpy(images).permute(0, 3, 1, 2)).pool.double().numpy()
