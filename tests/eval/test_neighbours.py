"""Precision and recall against distances in float64, pair by pair; ties, duplicates, tiles, extremes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ldit.errors import EvaluationError
from ldit.eval.metrics import neighbours
from ldit.eval.metrics.neighbours import precision_recall


def brute_force(x: Tensor, y: Tensor, k: int = 3) -> tuple[float, float, list[bool]]:
    """By definition: every distance a sum of squared differences in float64."""
    samples, references = x.double().numpy(), y.double().numpy()

    def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.stack([np.square(row - b).sum(1) for row in a])

    def radii(a: np.ndarray) -> np.ndarray:
        own = distances(a, a)
        return np.array([np.sort(np.delete(row, i))[k - 1] for i, row in enumerate(own)])

    between = distances(samples, references)
    reached = (between <= radii(references)).any(1)
    covered = (radii(samples) >= between.T).any(1)
    return float(reached.mean()), float(covered.mean()), reached.tolist()


def check(x: Tensor, y: Tensor, k: int = 3, tile: int = 10_000) -> tuple[float, float]:
    found = precision_recall(x, y, k, tile)
    assert (found.precision, found.recall, found.reached.tolist()) == brute_force(x, y, k)
    return found.precision, found.recall


def rows(count: int, width: int = 6, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("tile", [1, 7, 16, 50, 1000])
def test_tiles_change_nothing(tile: int) -> None:
    """Sets of 90 and 50: tiles that divide neither, one of them, of a row alone, and larger than both."""
    shares = check(rows(90, seed=1) + 0.7, rows(50, seed=2), tile=tile)
    assert 0.2 < min(shares) < max(shares) < 1.0


@pytest.mark.parametrize("k", [1, 2, 3, 10, 49])
def test_numbers_of_neighbours(k: int) -> None:
    check(rows(60, seed=1), rows(50, seed=2) * 1.3, k, tile=16)


def test_three_neighbours_and_both_directions() -> None:
    """Wide samples cover the references, narrow ones lie within them."""
    wide, narrow = rows(80, seed=1, scale=3.0), rows(70, seed=2)
    precision, recall = check(wide, narrow)
    assert precision < recall
    assert check(narrow, wide) == (recall, precision)


def test_the_sets_of_the_paper() -> None:
    """Equal sets: all of both. Far sets: nothing of either."""
    x = rows(50)
    assert check(x, x.clone()) == (1.0, 1.0)
    assert check(x, x + 100.0) == (0.0, 0.0)


@pytest.mark.parametrize("seed", range(20))
def test_ties_lie_inside(seed: int) -> None:
    """Points of a small grid: most distances are equal to others, and so to radii; many points are there several
    times. Off the origin float32 products round all of them."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randint(0, 4, (n, 3), generator=generator).float() for n in (60, 40))
    for shift, scale in ((0.0, 1.0), (1000.0, 1.0), (5.0, 0.5)):
        for k in (1, 3):
            check(x * scale + shift, y * scale + shift, k, tile=16)


def test_a_point_on_the_surface() -> None:
    """Radius 3 of the reference at 0; a sample at exactly 3, the next float32 beyond it, and a little before it."""
    references = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    beyond = float(np.nextafter(np.float32(-3.0), np.float32(-4.0)))
    samples = torch.tensor([[-3.0], [beyond], [-2.9999], [-50.0]])
    assert precision_recall(samples, references).reached.tolist() == [True, False, True, False]


@pytest.mark.parametrize(("short", "inside"), [(1e-15, True), (5e-12, False)])
def test_two_sums_of_the_same_squares_are_equal(short: float, inside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums in another order differ by that much; a distance that is longer than a radius by more is longer."""
    sound = neighbours._radii
    monkeypatch.setattr(neighbours, "_radii", lambda *given: sound(*given) * (1.0 - short))
    references = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    samples = torch.tensor([[-3.0], [6.0], [-50.0], [50.0]])
    assert precision_recall(samples, references).reached.tolist() == [inside, inside, False, False]


def test_equal_rows_are_neighbours_at_distance_zero() -> None:
    """A row is left out of its own neighbours by its place: three more copies make the radius 0."""
    point = torch.tensor([[0.3, -0.7, 1.9]])
    references = torch.cat([point.repeat(4, 1), rows(4, 3, scale=1e-3) + 40.0])
    nearby = torch.cat([point, point + 1e-5, point.repeat(2, 1)])
    assert precision_recall(nearby, references).reached.tolist() == [True, False, True, True]
    check(nearby, references)


def test_sets_of_one_image_only() -> None:
    """Blank images: no spread at all, many more copies than candidates, and every pair undecided in float32."""
    blank = torch.full((60, 4), 0.1)
    assert check(blank, blank[:50], tile=16) == (1.0, 1.0)
    assert check(blank, blank + 1e-6, tile=16) == (0.0, 0.0)
    collapsed = torch.cat([blank, rows(5, 4)])
    check(collapsed, rows(50, 4, seed=3), tile=16)
    check(rows(50, 4, seed=3), collapsed, tile=16)


def test_far_from_the_origin() -> None:
    """Features at 1,000 with deviations of 0.01: products of uncentred float32 rows would be off by 0.1 to 1."""
    x, y = rows(90, 16, seed=1, scale=0.01) + 1000.0, rows(60, 16, seed=2, scale=0.008) + 1000.0
    precision, recall = check(x, y)
    assert 0.0 < precision < 1.0 and 0.0 < recall <= 1.0


def test_two_far_clusters() -> None:
    """What centring cannot help: distances of 1 at 1e4 from the mean, where a float32 product is off by some 10, and
    more rows than are kept come into question as neighbours."""
    x, y = rows(80, 8, seed=1), rows(60, 8, seed=2)
    x[::2] += 1e4
    y[::2] += 1e4
    precision, recall = check(x, y, tile=32)
    assert 0.2 < precision < 1.0 and 0.2 < recall < 1.0


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-20, 1e15, 1e25, 1e37])
def test_every_scale_of_float32(scale: float) -> None:
    """Squares of such features are no float32 numbers."""
    x, y = rows(50, seed=1).clamp(-3, 3) * scale, rows(40, seed=2).clamp(-3, 3) * scale
    assert 0.0 < check(x, y, tile=16)[0] < 1.0


def test_outliers_do_not_blind_the_rest() -> None:
    """They move the mean by 25,000, where float32 numbers are 0.002 apart, more than the others lie from each other."""
    x, y = rows(50, seed=1) * 1e-3 + 2e-3, rows(40, seed=2) * 1e-3
    y[7] = 1e6
    precision, recall = check(x, y, tile=16)
    assert 0.0 < recall < 1.0 and precision == 1.0  # the outlier's ball holds everything


def test_a_sample_beyond_all_bounds_hides_no_distance() -> None:
    """Beside 1e25 the others' squares are below the least float32: products call them all equal."""
    x, y = rows(50, seed=1) * 1e-3 + 1e-3, rows(40, seed=2) * 1e-3
    x[7] = 1e25
    precision, _ = check(x, y, tile=16)
    assert 0.2 < precision < 0.98


@pytest.mark.parametrize("seed", range(5))
def test_ties_and_near_misses_that_no_product_tells_apart(seed: int) -> None:
    """Grids at ±2^22, where (3 + 32)·2^-53·6·2^44 of float64's rounding is 0.4 and squared distances go by 0.25."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randint(0, 12, (n, 3), generator=generator) * 0.5 for n in (60, 40))
    for points in (x, y):
        points[::2] += 2.0**22
        points[1::2] -= 2.0**22
    for tile in (16, 1000):
        precision, recall = check(x, y, 1, tile=tile)
        assert 0.0 < precision < 1.0 and 0.0 < recall < 1.0


@pytest.mark.parametrize("width", [1, 2, 300])
def test_widths(width: int) -> None:
    check(rows(60, width, seed=1).relu(), rows(50, width, seed=2).relu(), tile=32)


def test_products_settle_all_but_a_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 500 + 400 in 64 dimensions: in float64 only those within (64 + 32)·2^-24·(|x|² + |y|²), 1e-5 of the distances,
    of a radius, and none of them a tie."""
    asked: dict[str, int] = {"_decided": 0, "_within": 0, "_nearest_places": 0}
    for name in asked:
        monkeypatch.setattr(neighbours, name, counting(asked, name))
    check(rows(500, 64, seed=1) + 32.0, rows(400, 64, seed=2) + 32.0)  # off the origin, by 30 times their spread
    assert asked["_decided"] < 40 and asked["_nearest_places"] < 10 and asked["_within"] == 0


def test_images_that_are_all_equal_cost_a_pair_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one for each of the 3,000 pairs that no product decides."""
    asked = {"_within": 0}
    monkeypatch.setattr(neighbours, "_within", counting(asked, "_within"))
    blank = torch.full((60, 4), 0.1)
    assert check(blank, blank[:50]) == (1.0, 1.0)
    assert asked["_within"] == 60 + 50


def counting(asked: dict[str, int], name: str) -> Callable[..., Tensor]:
    """The function of that name, counting the rows it is given."""
    sound, place = getattr(neighbours, name), {"_decided": 0, "_nearest_places": 1, "_within": 3}[name]

    def counted(*given: Any) -> Tensor:
        asked[name] += len(given[place])
        return sound(*given)

    return counted


def test_tf32_is_off_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    said = []
    sound = neighbours._radii

    def looked(*arguments: object) -> Tensor:
        said.append(torch.get_float32_matmul_precision())
        return sound(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(neighbours, "_radii", looked)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        precision_recall(rows(10), rows(10, seed=1))
        assert said == ["highest", "highest"] and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_what_has_no_precision() -> None:
    with pytest.raises(EvaluationError, match="3 nearest neighbours need at least 4 samples, got 3"):
        precision_recall(rows(3), rows(9))
    with pytest.raises(EvaluationError, match="at least 4 references, got 3"):
        precision_recall(rows(9), rows(3))
    with pytest.raises(EvaluationError, match="6 wide and reference features 5"):
        precision_recall(rows(9), rows(9, 5))
    bad = rows(9)
    bad[5, 1] = torch.inf
    with pytest.raises(EvaluationError, match=r"^reference features of image 5 are not finite"):
        precision_recall(rows(9), bad)
    huge = rows(9)
    huge[0], huge[1] = 3e38, -3e38
    with pytest.raises(EvaluationError, match="too large"):
        precision_recall(huge, huge[:1].repeat(4, 1))
    check(rows(4), rows(4, seed=1))
