"""Distances in the first principal components of the reference: for sets too small for a covariance of all features."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ldit.errors import EvaluationError
from ldit.eval.frechet import frechet_distance
from ldit.eval.moments import Moments
from ldit.rng import generator

INTERVAL = (2.5, 97.5)  # percentiles


@dataclass(frozen=True)
class Components:
    """Axes of the largest variances of a reference: mean (D,), basis (D, K), float64."""

    mean: Tensor
    basis: Tensor

    def project(self, rows: Tensor) -> Tensor:
        """(N, D) -> (N, K) float64."""
        return (rows.double() - self.mean) @ self.basis

    def project_moments(self, moments: Moments) -> tuple[Tensor, Tensor]:
        """Mean (K,) and covariance (K, K) of what the moments are of."""
        return (moments.mean - self.mean) @ self.basis, self.basis.T @ moments.covariance @ self.basis


def principal_components(reference: Moments, count: int) -> Components:
    """The first `count` of a reference; EvaluationError where it does not span as many."""
    if not 1 <= count <= reference.width:
        raise EvaluationError(f"components: must be 1 to {reference.width}, got {count}")
    if reference.count <= count:
        raise EvaluationError(f"components: {count} are too many for a reference of {reference.count} pictures")
    vectors = torch.linalg.eigh(reference.covariance)[1]
    return Components(reference.mean, vectors.flip(1)[:, :count].contiguous())


def bootstrap(rows: Tensor, target: tuple[Tensor, Tensor], resamples: int, seed: int = 0) -> list[float]:
    """Fréchet distances to `target` (mean, covariance) of the rows (N, K) drawn again with replacement, `resamples`
    times (Efron 1979). The same seed draws the same rows, so sets of equal size can be compared pair by pair."""
    random = generator(seed, "bootstrap")
    found = []
    for _ in range(resamples):
        chosen = rows[torch.randint(len(rows), (len(rows),), generator=random)]
        centred = chosen - chosen.mean(0)
        covariance = centred.T @ centred / (len(rows) - 1)
        found.append(frechet_distance(chosen.mean(0), covariance, *target))
    return found


def interval(value: float, resampled: list[float]) -> list[float]:
    """The middle 95 % of resampled values, moved so that their mean is `value`: resampling repeats rows, which adds to
    every distance about what sampling them had added already (Efron & Tibshirani 1993, ch. 10)."""
    data = torch.tensor(resampled, dtype=torch.float64)
    return [value + (torch.quantile(data, p / 100) - data.mean()).item() for p in INTERVAL]
