"""Streaming moments against numpy's, in any batches and any order of merging."""

from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Tensor

from ldit.errors import EvaluationError
from ldit.eval.metrics import moments
from ldit.eval.metrics.moments import Moments
from ldit.parallel.world import World

# Of the largest entry: sums of some thousand float64 products are off by some units of 1e-16; a sum in float32 by 1e-8.
ROUNDING = 1e-13


def rows(count: int, width: int, dtype: torch.dtype = torch.float32, shift: float = 0.5) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    mixed = torch.randn(count, width, generator=generator) @ torch.randn(width, width, generator=generator)
    return (mixed + shift).to(dtype)


def of(*parts: Tensor) -> Moments:
    found = Moments(parts[0].shape[1])
    for part in parts:
        found.add(part)
    return found


def far(found: Moments, data: Tensor) -> float:
    """The largest difference from numpy's two passes in float64, relative to the largest entry."""
    exact = data.double().numpy()
    mean, covariance = exact.mean(0), np.cov(exact, rowvar=False).reshape(data.shape[1], -1)
    assert found.count == len(data) and found.mean.dtype == found.covariance.dtype == torch.float64
    off = np.abs(found.mean.numpy() - mean).max() / np.abs(exact).max()
    return max(off, np.abs(found.covariance.numpy() - covariance).max() / np.abs(covariance).max())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [1, 7, 64, 1000])
def test_streaming_is_the_whole(batch: int, dtype: torch.dtype) -> None:
    data = rows(300, 9, dtype)
    assert far(of(*data.split(batch)), data) < ROUNDING


def test_width_one_and_unequal_batches() -> None:
    data = rows(50, 1)
    assert far(of(data[:1], data[1:1], data[1:3], data[3:40], data[40:]), data) < ROUNDING


@pytest.mark.parametrize("width", [7, 8, 9, 17])
def test_bands_of_the_covariance(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bands of 4 rows, of which the last may be smaller: both triangles, and symmetric to the last bit."""
    monkeypatch.setattr(moments, "_BAND", 4)
    data = rows(30, width)
    found = of(data[:11], data[11:])
    assert far(found, data) < ROUNDING and torch.equal(found.covariance, found.covariance.T)


def test_long_batches_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "_ROWS", 8)
    data = rows(99, 5)
    assert far(of(data), data) < ROUNDING


def test_a_mean_far_from_zero_takes_nothing_from_the_covariance() -> None:
    """Of rows at 1e7 with deviations of 1, sums of squares would leave 1e14·1e-16 = 1 % of the variance. Here a mean is
    rounded to 1e7·1e-16 = 1e-9, and a product of deviations by twice that."""
    data = rows(400, 4, torch.float64, shift=1e7)
    assert far(of(*data.split(13)), data) < 1e-8


def test_any_order_of_merging() -> None:
    data = rows(240, 6)
    parts = [of(*part.split(20)) for part in data.split([1, 100, 39, 100])]
    for order in permutations(range(4)):
        whole = Moments(6)
        for index in order:
            whole.merge(parts[index])
        assert far(whole, data) < ROUNDING
    left, right = Moments(6), Moments(6)
    for half, chosen in ((left, parts[:2]), (right, parts[2:])):
        for part in chosen:
            half.merge(part)
    left.merge(right)
    assert far(left, data) < ROUNDING and [part.count for part in parts] == [1, 100, 39, 100]


def test_empty_moments_change_nothing() -> None:
    data = rows(30, 3)
    whole = Moments(3)
    whole.merge(Moments(3))
    assert whole.count == 0 and not whole.mean.any()
    whole.merge(of(data))
    whole.merge(Moments(3))
    alone = of(data)
    assert whole.count == 30 and torch.equal(whole.mean, alone.mean) and torch.equal(whole.covariance, alone.covariance)


def test_a_single_process_merges_to_itself() -> None:
    alone = of(rows(30, 3))
    whole = alone.merged(World(torch.device("cpu")))
    assert whole is not alone and torch.equal(whole.covariance, alone.covariance)
    whole.add(rows(10, 3))
    assert (whole.count, alone.count) == (40, 30)


def test_the_covariance_is_symmetric_to_the_bit() -> None:
    covariance = of(*rows(500, 33).split(9)).covariance
    assert torch.equal(covariance, covariance.T)


def test_callers_cannot_change_the_sums() -> None:
    alone = of(rows(30, 3))
    alone.mean.zero_()
    alone.covariance.zero_()
    assert alone.mean.any() and alone.covariance.any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_is_named(value: float) -> None:
    """By its number among all, or by the image's; the batch leaves no trace."""
    data, bad = rows(20, 4), rows(6, 4)
    bad[3, 2], bad[5, 0] = value, value
    whole = of(data)
    before = whole.covariance
    with pytest.raises(EvaluationError, match="features of image 23 are not finite"):
        whole.add(bad)
    with pytest.raises(EvaluationError, match="features of image 1003 are not finite"):
        whole.add(bad, first=1000)
    assert whole.count == 20 and torch.equal(whole.covariance, before)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_rows_have_no_covariance(count: int) -> None:
    with pytest.raises(EvaluationError, match=f"at least 2 images, got {count}"):
        _ = of(rows(5, 3)[:count]).covariance


def test_other_widths_are_the_callers_fault() -> None:
    with pytest.raises(ValueError, match="3 wide"):
        Moments(3).add(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="3 and 4 wide"):
        Moments(3).merge(Moments(4))
