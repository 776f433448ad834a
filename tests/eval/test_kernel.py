"""The kernel distance against loops over pairs; its subsets; that it is not biased."""

from itertools import product

import pytest
import torch
from torch import Tensor

from ldit.errors import EvaluationError
from ldit.eval.metrics.kernel import kernel_distance
from ldit.rng import generator

ROUNDING = 2e-6
"""Of kernels up to about 30 in these small sets: 3·u²·|w| of them times some roundings of 2^-24, and averaged."""


def rows(count: int, width: int = 5, seed: int = 0, shift: float = 0.0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + shift


def brute_force(x: list[list[float]], y: list[list[float]]) -> float:
    """Pair by pair, in Python's numbers."""

    def kernel(a: list[float], b: list[float]) -> float:
        return (sum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1.0) ** 3

    def own(z: list[list[float]]) -> float:
        pairs = [(i, j) for i, j in product(range(len(z)), repeat=2) if i != j]
        return sum(kernel(z[i], z[j]) for i, j in pairs) / len(pairs)

    return own(x) + own(y) - 2.0 * sum(kernel(a, b) for a, b in product(x, y)) / (len(x) * len(y))


def test_whole_sets_are_the_brute_force() -> None:
    """There is one subset then. Where one set has a row more there are a hundred, and they differ."""
    x, y = rows(12, seed=1), rows(12, seed=2, shift=0.5)
    found = kernel_distance(x, y)
    assert (found.deviation, found.subset_size, found.subsets) == (0.0, 12, 1)
    assert found.mean == pytest.approx(brute_force(x.tolist(), y.tolist()), abs=ROUNDING)
    for more in (kernel_distance(rows(13), y), kernel_distance(y, rows(13))):
        assert more.subsets == 100 and more.subset_size == 12 and more.deviation > 0.001


def test_subsets_are_the_brute_force() -> None:
    """Of a generator for each subset and side."""
    x, y = rows(30, seed=1), rows(20, seed=2, shift=0.5)
    expected = []
    for number in range(6):
        draws = [torch.randperm(len(z), generator=generator(0, "kid", number, side))[:7]
                 for z, side in ((x, "samples"), (y, "references"))]  # fmt: skip
        assert all(len(set(draw.tolist())) == 7 for draw in draws)
        expected.append(brute_force(x[draws[0]].tolist(), y[draws[1]].tolist()))
    exact = torch.tensor(expected, dtype=torch.float64)
    found = kernel_distance(x, y, subsets=6, subset_size=7)
    assert (found.subset_size, found.subsets) == (7, 6)
    assert found.mean == pytest.approx(float(exact.mean()), abs=ROUNDING)
    assert found.deviation == pytest.approx(float(exact.std(correction=0)), abs=ROUNDING) and found.deviation > 0.01
    assert found == kernel_distance(x, y, subsets=6, subset_size=7)


def test_features_of_an_extractor() -> None:
    """Not negative, with few common directions. By float64 within 2e-10; products of these rows in float32, without the
    centre, would be 1e-8 and more off. 450 rows fall into three bands, of which the last is smaller."""
    directions = rows(16, 512, seed=9).abs()
    x, y = (
        (rows(450, 16, seed=seed, shift=1.0).abs() @ directions * 0.05 + rows(450, 512, seed=seed + 10).abs() * 0.2)
        for seed in (1, 2)
    )

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a.double() @ b.double().T / 512 + 1.0) ** 3

    def own(z: Tensor) -> Tensor:
        return (kernel(z, z).sum() - kernel(z, z).diagonal().sum()) / (450 * 449)

    exact = float(own(x) + own(y) - 2.0 * kernel(x, y).mean())
    assert abs(kernel_distance(x, y).mean - exact) < 2e-10
    assert abs(kernel_distance(x.double() + 0.0, y).mean - exact) < 2e-10


def test_the_smaller_set_sets_the_size() -> None:
    assert kernel_distance(rows(9), rows(40)).subset_size == 9
    assert kernel_distance(rows(40), rows(9)).subset_size == 9
    assert kernel_distance(rows(1100, 2), rows(1200, 2), subsets=2).subset_size == 1000


def test_it_is_not_biased() -> None:
    """Halves of one Gaussian, drawn anew two hundred times, of 20 rows each: the mean lies within four standard errors
    of 0. With the pairs of a row and itself the estimate would be above by a hundred of them."""
    found = []
    for seed in range(200):
        both = rows(40, 4, seed=seed, shift=0.3)
        found.append(kernel_distance(both[:20], both[20:], subsets=1).mean)
    values = torch.tensor(found, dtype=torch.float64)
    error = values.std() / len(values) ** 0.5
    assert values.mean().abs() < 4.0 * error
    # With them, brute force says how far off it would be.
    off = 0.0
    for z in (both[:20].double(), both[20:].double()):
        own = (z @ z.T / 4 + 1.0) ** 3
        off += float(own.mean() - (own.sum() - own.diagonal().sum()) / 380)
    assert off > 8.0 * error


def test_it_grows_with_the_shift() -> None:
    means = [kernel_distance(rows(200, seed=1), rows(200, seed=2, shift=shift)).mean for shift in (0.0, 0.2, 0.5, 1.0)]
    assert means == sorted(means) and means[1] > 2.0 * abs(means[0])


def test_half_precision_features_and_large_ones() -> None:
    x, y = rows(12, seed=1).half(), rows(12, seed=2).half()
    assert kernel_distance(x, y).mean == pytest.approx(brute_force(x.tolist(), y.tolist()), abs=ROUNDING)
    x, y = rows(12, seed=1), rows(13, seed=2)
    large = kernel_distance(x * 1e15, y * 1e15)
    exact = kernel_distance(x, y)
    assert 0.0 < large.deviation < 1e92 and abs(large.mean) < 1e92 and exact.deviation > 0.0


def test_what_has_no_kernel_distance() -> None:
    for x, y in ((rows(1), rows(9)), (rows(9), rows(1)), (rows(0), rows(9))):
        with pytest.raises(EvaluationError, match=f"at least 2 images on each side, got {len(x)} and {len(y)}"):
            kernel_distance(x, y)
    with pytest.raises(EvaluationError, match="5 features and 4 reference features"):
        kernel_distance(rows(9), rows(9, 4))
    bad = rows(9)
    bad[4, 1] = torch.nan
    with pytest.raises(EvaluationError, match=r"^features of image 4 are not finite"):
        kernel_distance(bad, rows(9))
    with pytest.raises(EvaluationError, match=r"^reference features of image 4 are not finite"):
        kernel_distance(rows(9), bad)
    with pytest.raises(EvaluationError, match="too large"):
        kernel_distance(rows(9).double() * 1e120, rows(9).double())
