"""The Inception Score (Salimans et al. 2016), from logits that come in batches and from several processes.

A split of images scores exp(mean KL(p(y|x) || mean p)). That mean is H(mean p) - mean H(p), so a split is three sums:
images, probabilities, sum of p·log p.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ldit.errors import EvaluationError
from ldit.eval.metrics.rows import check_finite, double
from ldit.parallel.world import World

SPLIT = 5000
"""Images of a split, as the field's evaluators take them."""


class Score(NamedTuple):
    """Mean and deviation (over the number of splits) of the scores of the splits; one split has the deviation 0."""

    mean: float
    deviation: float
    splits: int


class _Split:
    """Sums over the images of one split, in float64 on the CPU."""

    def __init__(self, classes: int) -> None:
        self.count, self.negentropy = 0, 0.0
        self.total = torch.zeros(classes, dtype=torch.float64)

    def add(self, count: int, negentropy: float, total: Tensor) -> None:
        self.count += count
        self.negentropy += negentropy
        self.total += total

    def score(self) -> float:
        mean = self.total / self.count
        return math.exp(self.negentropy / self.count - float(torch.xlogy(mean, mean).sum()))


class InceptionScore:
    """Splits of `splits_of` images in the order of their numbers, wherever and in whatever batches they come; the
    last, partial one counts as much as the others. Memory is one number a class and split."""

    def __init__(self, splits_of: int = SPLIT) -> None:
        if splits_of < 1:
            raise ValueError(f"splits_of: must be at least 1, got {splits_of}")
        self.splits_of = splits_of
        self._splits: dict[int, _Split] = {}

    def add(self, first_index: int, logits: Tensor) -> None:
        """Logits (B, K) of the images first_index, first_index + 1, …; each image once, on one process.
        EvaluationError names an image whose logits are not finite; nothing of the batch is taken then."""
        check_finite(logits, "logits", first_index)
        done = 0
        while done < len(logits):
            index = first_index + done
            split = index // self.splits_of
            rows = logits[done : done + (split + 1) * self.splits_of - index]
            chances = torch.softmax(double(rows), dim=1)
            self._take(split, len(rows), float(torch.xlogy(chances, chances).sum()), chances.sum(dim=0).cpu())
            done += len(rows)

    def _take(self, split: int, count: int, negentropy: float, total: Tensor) -> None:
        sums = self._splits.setdefault(split, _Split(len(total)))
        if len(total) != len(sums.total):
            raise ValueError(f"logits of {len(total)} and of {len(sums.total)} classes")
        if sums.count + count > self.splits_of:
            raise ValueError(f"split {split} was given more than its {self.splits_of} images")
        sums.add(count, negentropy, total)

    def merge(self, other: "InceptionScore") -> None:
        """Take in the images of `other`, which stays as it is."""
        if other.splits_of != self.splits_of:
            raise ValueError(f"splits of {self.splits_of} and of {other.splits_of} images cannot be merged")
        for split, sums in sorted(other._splits.items()):
            self._take(split, sums.count, sums.negentropy, sums.total)

    def merged(self, world: World) -> "InceptionScore":
        """Of all processes' images, in the order of their ranks: the same on every process."""
        own = [[split, s.count, s.negentropy, s.total.tolist()] for split, s in sorted(self._splits.items())]
        whole = InceptionScore(self.splits_of)
        for part in world.gather(own):
            for split, count, negentropy, total in part:
                whole._take(split, count, negentropy, torch.tensor(total, dtype=torch.float64))
        return whole

    def value(self) -> Score:
        """EvaluationError without images; ValueError when images between the first and the last are missing."""
        if not self._splits:
            raise EvaluationError("the Inception Score needs at least 1 image, got 0")
        splits = [sums for _, sums in sorted(self._splits.items())]
        if max(self._splits) != len(splits) - 1 or any(sums.count < self.splits_of for sums in splits[:-1]):
            raise ValueError("the Inception Score was not given every image from 0 on")
        scores = torch.tensor([sums.score() for sums in splits], dtype=torch.float64)
        return Score(float(scores.mean()), float(scores.std(correction=0)), len(scores))
