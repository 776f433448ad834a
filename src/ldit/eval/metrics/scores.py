"""The Inception Score (Salimans et al. 2016), from logits that come in batches and from several ranks.

The score of a split of images is exp(mean KL(p(y|x) || mean p)). The exponent is H(mean p) - mean H(p), so three sums
suffice for a split: the number of images, the probabilities, and p·log p. Images are split in their order, 5,000 at a
time (guided-diffusion), or shuffled (torch-fidelity).
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldit.errors import EvaluationError
from ldit.eval.metrics.rows import check_finite, double
from ldit.parallel.world import World

SPLIT = 5000
"""Images in a split, as usual."""


def shuffled_splits(count: int, splits: int = 10, seed: int = 2020) -> Tensor:
    """The split (count,) of each image as torch-fidelity has them: `splits` equal parts of a shuffled order."""
    splits = max(min(splits, count), 1)
    order = torch.from_numpy(np.random.RandomState(seed).permutation(count))
    ends = torch.tensor([k * count // splits for k in range(1, splits)])
    found = torch.empty(count, dtype=torch.int64)
    found[order] = torch.bucketize(torch.arange(count), ends, right=True)
    return found


class Score(NamedTuple):
    """Mean and standard deviation (divided by the number of splits) of the splits' scores; 0 for a single split."""

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
    """The score over splits of `splits_of` consecutive images, which may come in any order and batches, on any rank.
    The last split may be smaller and counts as much as the others. `assigned` (N,) gives the split of each image
    instead, for sets of a known size. Memory: one number for each class and split."""

    def __init__(self, splits_of: int = SPLIT, assigned: Tensor | None = None) -> None:
        if splits_of < 1:
            raise ValueError(f"splits_of: must be at least 1, got {splits_of}")
        self.splits_of, self.assigned = splits_of, assigned
        self._splits: dict[int, _Split] = {}

    def add(self, first_index: int, logits: Tensor) -> None:
        """Add logits (B, K) of images first_index, first_index + 1, …; each image once, on one rank. EvaluationError
        names an image whose logits are not finite; then nothing of the batch is added."""
        check_finite(logits, "logits", first_index)
        # A batch may extend over several splits.
        splits = self._of(torch.arange(first_index, first_index + len(logits)))
        for split in splits.unique().tolist():
            p = torch.softmax(double(logits[(splits == split).to(logits.device)]), dim=1)
            self._take(split, len(p), float(torch.xlogy(p, p).sum()), p.sum(dim=0).cpu())

    def _of(self, images: Tensor) -> Tensor:
        """The split of each image, by their numbers (B,)."""
        return images // self.splits_of if self.assigned is None else self.assigned[images]

    def _size(self, split: int) -> int:
        """The number of images of a split; of the last one without an assignment, its largest."""
        return self.splits_of if self.assigned is None else int((self.assigned == split).sum())

    def _take(self, split: int, count: int, negentropy: float, total: Tensor) -> None:
        sums = self._splits.setdefault(split, _Split(len(total)))
        if len(total) != len(sums.total):
            raise ValueError(f"logits of {len(total)} and of {len(sums.total)} classes")
        if sums.count + count > self._size(split):
            raise ValueError(f"split {split} was given more than its {self._size(split)} images")
        sums.add(count, negentropy, total)

    def merge(self, other: "InceptionScore") -> None:
        """Add the images of `other`, which is not changed."""
        if other.splits_of != self.splits_of:
            raise ValueError(f"splits of {self.splits_of} and of {other.splits_of} images cannot be merged")
        for split, sums in sorted(other._splits.items()):
            self._take(split, sums.count, sums.negentropy, sums.total)

    def merged(self, world: World) -> "InceptionScore":
        """The sums of all ranks' images, merged in the order of the ranks, on every rank."""
        own = [[split, s.count, s.negentropy, s.total.tolist()] for split, s in sorted(self._splits.items())]
        merged = InceptionScore(self.splits_of, self.assigned)
        for part in world.gather(own):
            for split, count, negentropy, total in part:
                merged._take(split, count, negentropy, torch.tensor(total, dtype=torch.float64))
        return merged

    def value(self) -> Score:
        """The score. EvaluationError without images; ValueError when images in between are missing."""
        if not self._splits:
            raise EvaluationError("the Inception Score needs at least 1 image, got 0")
        splits = [sums for _, sums in sorted(self._splits.items())]
        whole = splits if self.assigned is not None else splits[:-1]
        missing = any(sums.count < self._size(split) for split, sums in enumerate(whole))
        if missing or max(self._splits) != len(splits) - 1:
            raise ValueError("the Inception Score was not given every image from 0 on")
        scores = torch.tensor([sums.score() for sums in splits], dtype=torch.float64)
        return Score(float(scores.mean()), float(scores.std(correction=0)), len(scores))
