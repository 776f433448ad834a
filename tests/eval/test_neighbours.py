"""Precision and recall against distances in float64, pair by pair; tiles, copies, the limits of float32."""

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


def test_the_surface_belongs_to_the_ball() -> None:
    """Whole numbers, whose products float32 holds: radii 9, 6, 5 and 9, reaching from -13 to 14."""
    references = torch.tensor([[-4.0], [-1.0], [0.0], [5.0]])
    samples = torch.tensor([[-13.0], [-13.5], [14.0], [14.5]])
    assert precision_recall(samples, references).reached.tolist() == [True, False, True, False]
    check(samples, references)


def test_equal_rows_are_neighbours_at_distance_zero() -> None:
    """A row is left out of its own neighbours by its place: three more copies make the radius 0."""
    point = torch.tensor([[0.3, -0.7, 1.9]])
    references = torch.cat([point.repeat(4, 1), rows(4, 3, scale=1e-3) + 40.0])
    nearby = torch.cat([point, point + 0.1, point.repeat(2, 1)])
    assert precision_recall(nearby, references).reached.tolist() == [True, False, True, True]
    check(nearby, references)


def test_copies_are_at_distance_zero_in_every_tile() -> None:
    """Sets of a few images, many times each: all radii are 0, and so are the distances to an equal row alone. Products
    of two tiles round otherwise than those of a tile with itself."""
    few = rows(5, 300, seed=3) + 10.0
    references, samples = few.repeat(9, 1), torch.cat([few[:3].repeat(9, 1), few[3:] + 0.5])
    for tile in (4, 7, 1000):
        found = precision_recall(samples, references, tile=tile)
        assert found.reached.tolist() == [True] * 27 + [False] * 2 and found.recall == 1.0
        assert (
            precision_recall(references, samples[:27], tile=tile).reached.tolist()
            == [True, True, True, False, False] * 9
        )


def test_sets_of_one_image_only() -> None:
    """Blank images: no spread at all."""
    blank = torch.full((60, 4), 0.1)
    assert check(blank, blank[:50], tile=16) == (1.0, 1.0)
    assert check(blank, blank + 1e-4, tile=16) == (0.0, 0.0)
    collapsed = torch.cat([blank, rows(5, 4)])
    check(collapsed, rows(50, 4, seed=3), tile=16)
    check(rows(50, 4, seed=3), collapsed, tile=16)


def test_far_from_the_origin() -> None:
    """Features at 1,000 with deviations of 0.01: products of uncentred float32 rows would be off by 0.1 to 1."""
    x, y = rows(90, 16, seed=1, scale=0.01) + 1000.0, rows(60, 16, seed=2, scale=0.008) + 1000.0
    precision, recall = check(x, y)
    assert 0.0 < precision < 1.0 and 0.0 < recall <= 1.0


@pytest.mark.parametrize(("apart", "told"), [(0.02, True), (0.002, False)])
def test_the_stated_limit(apart: float, told: bool) -> None:
    """Of 2,048 features, rows are told apart from 0.7 % of their distance from the mean on."""
    corner = rows(1, 2048, seed=4)
    step = apart * corner.norm() / 2048**0.5
    near = torch.cat([sign * corner + i * step for sign in (-1, 1) for i in range(4)])
    near -= near.mean(0)
    radii = neighbours._radii(near, near.square().sum(1), 1, 4096)
    assert (radii > 0).tolist() == [told] * 8


@pytest.mark.parametrize("scale", [1e-15, 1e-6, 1e6, 1e15])
def test_scales(scale: float) -> None:
    x, y = rows(50, seed=1) * scale, rows(40, seed=2) * scale
    assert 0.0 < check(x, y, tile=16)[0] < 1.0


def test_no_more_than_a_tile_of_distances_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """That is what memory depends on. Each pair is multiplied once: half of those within a set, all between the two."""
    sound, sizes = neighbours._squared_distances, []

    def counted(x: Tensor, y: Tensor, x_squares: Tensor, y_squares: Tensor) -> Tensor:
        sizes.append(len(x) * len(y))
        return sound(x, y, x_squares, y_squares)

    monkeypatch.setattr(neighbours, "_squared_distances", counted)
    precision_recall(rows(64, seed=1), rows(48, seed=2), tile=16)
    assert max(sizes) == 16 * 16 and len(sizes) == 10 + 6 + 12


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
    with pytest.raises(EvaluationError, match="6 features and 5 reference features"):
        precision_recall(rows(9), rows(9, 5))
    bad = rows(9)
    bad[5, 1] = torch.inf
    with pytest.raises(EvaluationError, match=r"^reference features of image 5 are not finite"):
        precision_recall(rows(9), bad)
    for size in (3e38, 1e25):
        huge = rows(9)
        huge[0], huge[1] = size, -size
        for x, y in ((huge, rows(9)), (rows(9), huge), (huge, huge[:1].repeat(4, 1))):
            with pytest.raises(EvaluationError, match="too large"):
                precision_recall(x, y)
    check(rows(4), rows(4, seed=1))
