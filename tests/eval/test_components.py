"""Distances in principal components, and intervals by resampling."""

import pytest
import torch

from ldit.errors import EvaluationError
from ldit.eval.metrics.components import bootstrap, interval, principal_components
from ldit.eval.metrics.frechet import frechet_distance


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


def test_as_many_rows_are_drawn_as_there_are() -> None:
    """Far from a target of the same spread the distance is (mean - 10)², whose deviation over draws of N rows is
    20·σ/√N: half as many would give 1.4 of it. That of 1,000 draws has itself one of 2.2 %."""
    rows = torch.randn(400, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    target = (torch.full((1,), 10.0, dtype=torch.float64), torch.cov(rows.T).reshape(1, 1))
    found = torch.tensor(bootstrap(rows, target, 1000), dtype=torch.float64)
    expected = 2 * (10.0 - rows.mean()) * rows.std(correction=0) / 400**0.5
    assert found.std().item() == pytest.approx(expected.item(), rel=0.09)


def test_an_interval_is_the_middle_of_what_was_drawn_about_the_value() -> None:
    drawn = [float(number) for number in range(1001)]
    assert interval(700.0, drawn) == pytest.approx([700.0 + 25 - 500, 700.0 + 975 - 500], abs=1e-9)
    assert interval(7.0, drawn)[0] == 0.0


def test_an_eigenproblem_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(matrix: torch.Tensor) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    with pytest.raises(EvaluationError, match=r"^the reference has no principal components: did not converge$"):
        principal_components(torch.zeros(2), torch.eye(2), 1)


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "must be 1 to 4"), (5, "must be 1 to 4"), (3, "3 are too many for a reference that spans 2")],
)
def test_too_many_components(count: int, words: str) -> None:
    with pytest.raises(EvaluationError, match=words):
        principal_components(*moments(normal(3, 0)), count)
