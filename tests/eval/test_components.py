"""Distances in principal components, and intervals by resampling."""

import pytest
import torch

from ldit.errors import EvaluationError
from ldit.eval.components import bootstrap, interval, principal_components
from ldit.eval.frechet import frechet_distance


def moments(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return rows.mean(0), torch.cov(rows.T)


def normal(count: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    scale = torch.tensor([5.0, 3.0, 1.0, 0.1], dtype=torch.float64)
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale + shift


def test_components_are_the_axes_of_the_largest_variances() -> None:
    rows = normal(4000, 0, 2.0)
    axes = principal_components(*moments(rows), 2)
    assert (axes.basis.abs()[[0, 1], [0, 1]] > 0.999).all()
    projected = axes.project(rows)
    assert projected.mean(0).abs().max() < 1e-12
    assert projected.var(0) == pytest.approx(torch.linalg.eigvalsh(torch.cov(rows.T)).flip(0)[:2], rel=1e-12)


def test_projected_moments_are_moments_of_projected_rows() -> None:
    axes, other = principal_components(*moments(normal(300, 0)), 3), normal(200, 1, 0.5)
    mean, covariance = axes.project_moments(*moments(other))
    rows = axes.project(other)
    assert torch.allclose(mean, rows.mean(0), rtol=1e-12) and torch.allclose(covariance, torch.cov(rows.T), rtol=1e-10)


def test_the_interval_covers_as_often_as_it_says() -> None:
    """Of 60 sets of 300 rows the distance of a far larger set lies in the 95 % interval of at least 50, once the excess
    of small sets is taken off; the chance of fewer, were it right, is below 1 in 100."""
    target = (torch.zeros(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64))
    sets = [normal(300, 10 + k, 0.3) for k in range(60)]
    values = [frechet_distance(rows.mean(0), torch.cov(rows.T), *target) for rows in sets]
    middle, hits = sum(values) / len(values), 0
    for rows, value in zip(sets, values, strict=True):
        low, high = interval(value, bootstrap(rows, target, 80))
        assert low < value < high
        hits += low <= middle <= high
    assert hits >= 50


def test_the_same_seed_draws_the_same_rows() -> None:
    target = (torch.zeros(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64))
    rows = normal(50, 3)
    one = bootstrap(rows, target, 5)
    assert one == bootstrap(rows, target, 5) and len(set(one)) == 5
    assert one != bootstrap(rows, target, 5, seed=1)


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "must be 1 to 4"), (5, "must be 1 to 4"), (3, "3 are too many for a reference that spans 2")],
)
def test_too_many_components(count: int, words: str) -> None:
    with pytest.raises(EvaluationError, match=words):
        principal_components(*moments(normal(3, 0)), count)
