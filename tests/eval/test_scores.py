"""The Inception Score against a loop over images, in any batches, order and number of processes."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ldit.errors import EvaluationError
from ldit.eval.metrics.scores import InceptionScore, shuffled_splits
from ldit.parallel.world import World


def logits(count: int, classes: int = 7, scale: float = 3.0) -> Tensor:
    return torch.randn(count, classes, generator=torch.Generator().manual_seed(count)) * scale


def brute_force(values: Tensor, splits_of: int) -> list[float]:
    """The score of each split, image by image."""
    scores = []
    for first in range(0, len(values), splits_of):
        chances = []
        for row in values[first : first + splits_of].double().numpy():
            powers = np.exp(row - row.max())
            chances.append(powers / powers.sum())
        mean = sum(chances) / len(chances)
        divergences = [
            sum(p * (math.log(p) - math.log(m)) for p, m in zip(row, mean, strict=True) if p > 0) for row in chances
        ]
        scores.append(math.exp(sum(divergences) / len(divergences)))
    return scores


def check(score: InceptionScore, values: Tensor, splits_of: int) -> None:
    expected = brute_force(values, splits_of)
    mean, deviation, splits = score.value()
    assert splits == len(expected) == -(-len(values) // splits_of)
    assert mean == pytest.approx(np.mean(expected), rel=1e-12)
    assert deviation == pytest.approx(np.std(expected), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("splits_of", [1, 8, 20, 50, 100])
@pytest.mark.parametrize("batch", [1, 3, 50])
def test_in_batches(batch: int, splits_of: int) -> None:
    """The last split is short for 8 and 20; at 100 it is the only one."""
    values, score = logits(50), InceptionScore(splits_of)
    for first in range(0, 50, batch):
        score.add(first, values[first : first + batch])
    check(score, values, splits_of)


@pytest.mark.parametrize(("count", "splits"), [(57, 10), (50, 10), (7, 7)])
def test_shuffled_splits(count: int, splits: int) -> None:
    """As torch-fidelity has them: equal parts of the images in a shuffled order, which batches and ranks do not see."""
    values, assigned = logits(count), shuffled_splits(count)
    order = np.random.RandomState(2020).permutation(count)
    shuffled = values[torch.from_numpy(order)]
    expected = []
    for k in range(splits):
        part = shuffled[k * count // splits : (k + 1) * count // splits]
        expected += brute_force(part, len(part))
    scores = [InceptionScore(assigned=assigned) for _ in range(3)]
    for first in range(0, count, 4):
        scores[first % 3].add(first, values[first : first + 4])
    whole = InceptionScore(assigned=assigned)
    for part in scores:
        whole.merge(part)
    assert whole.value() == pytest.approx((np.mean(expected), np.std(expected), splits), rel=1e-9)
    lost = InceptionScore(assigned=assigned)
    lost.add(0, values[:-1])
    with pytest.raises(ValueError, match="not given every image"):
        lost.value()
    with pytest.raises(ValueError, match="was given more than its"):
        whole.add(0, values[:1])


def test_a_short_split_counts_as_much_as_the_others() -> None:
    """Eight images of one class, then one: the only difference is the mean over splits."""
    values = torch.zeros(9, 2)
    values[:4, 0] = values[4:8, 1] = values[8, 0] = 200.0
    score = InceptionScore(8)
    score.add(0, values)
    assert score.value() == pytest.approx((1.5, 0.5, 2), rel=1e-12)


def test_the_splits_are_of_five_thousand() -> None:
    values, score = logits(5003, 3), InceptionScore()
    score.add(0, values)
    check(score, values, 5000)


def test_any_order_and_merging() -> None:
    values, parts = logits(50), [InceptionScore(8) for _ in range(3)]
    for number, first in enumerate(reversed(range(0, 50, 5))):
        parts[number % 3].add(first, values[first : first + 5])
    whole = InceptionScore(8)
    for part in parts:
        whole.merge(part)
    check(whole, values, 8)
    check(whole.merged(World(torch.device("cpu"))), values, 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_probabilities_are_of_float64(dtype: torch.dtype) -> None:
    values, score = logits(20).to(dtype), InceptionScore(8)
    score.add(0, values)
    check(score, values, 8)


def test_certain_images_score_the_number_of_classes() -> None:
    """Chances of exactly 0 and 1, and logits of any size a float32 holds."""
    for size in (1e3, 3e38):
        score = InceptionScore()
        score.add(0, torch.eye(10).repeat(3, 1) * size)
        assert score.value() == pytest.approx((10.0, 0.0, 1), rel=1e-12)
    score = InceptionScore()
    score.add(0, torch.zeros(5, 4))
    assert score.value().mean == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_named(value: float) -> None:
    values, score = logits(20), InceptionScore(8)
    values[13, 2] = value
    score.add(0, values[:10])
    with pytest.raises(EvaluationError, match="logits of image 13 are not finite"):
        score.add(10, values[10:])
    check(score, values[:10], 8)


def test_no_images_have_no_score() -> None:
    with pytest.raises(EvaluationError, match="at least 1 image, got 0"):
        InceptionScore().value()


def test_images_counted_twice_or_left_out_are_noticed() -> None:
    score = InceptionScore(8)
    score.add(0, logits(8))
    with pytest.raises(ValueError, match="more than its 8"):
        score.add(4, logits(1))
    score.add(16, logits(3))
    with pytest.raises(ValueError, match="every image"):
        score.value()
    score.add(9, logits(7))
    with pytest.raises(ValueError, match="every image"):
        score.value()
    with pytest.raises(ValueError, match="classes"):
        score.add(17, logits(1, 6))
    with pytest.raises(ValueError, match="splits of 8 and of 9"):
        score.merge(InceptionScore(9))
