"""Principal components of the reference, for sets too small for a covariance of all features; bootstrap intervals."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ldit.errors import EvaluationError
from ldit.eval.metrics.frechet import frechet_distance
from ldit.rng import generator

INTERVAL = (2.5, 97.5)  # percentiles


@dataclass(frozen=True)
class Components:
    """The first principal components of a reference: mean (D,), basis (D, K), float64."""

    mean: Tensor
    basis: Tensor

    def project(self, rows: Tensor) -> Tensor:
        """(N, D) -> (N, K) float64."""
        parts = [(part.double() - self.mean) @ self.basis for part in rows.split(4096)]  # few rows in float64 at a time
        return torch.cat(parts)

    def project_moments(self, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (D,) and covariance (D, D) of rows -> mean (K,) and covariance (K, K) of the projected rows."""
        return (mean - self.mean) @ self.basis, self.basis.T @ covariance @ self.basis


def principal_components(mean: Tensor, covariance: Tensor, count: int) -> Components:
    """The first `count` principal components of a reference with mean (D,) and covariance (D, D). EvaluationError if it
    spans fewer dimensions, because it has too few images."""
    width = len(mean)
    if not 1 <= count <= width:
        raise EvaluationError(f"components: must be 1 to {width}, got {count}")
    try:
        values, vectors = torch.linalg.eigh(covariance)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise EvaluationError(f"the reference has no principal components: {error}") from None
    spanned = int((values > values[-1] * width * torch.finfo(values.dtype).eps).sum())
    if spanned < count:
        raise EvaluationError(f"components: {count} are too many for a reference that spans {spanned}")
    return Components(mean, vectors.flip(1)[:, :count].contiguous())


@dataclass(frozen=True)
class Cloud:
    """A set in two principal components, on the CPU: some of its points (n, 2), with n = 0 if its features are unknown;
    mean (2,) and covariance (2, 2) of all."""

    points: Tensor
    mean: Tensor
    covariance: Tensor


def cloud(axes: Components, mean: Tensor, covariance: Tensor, rows: Tensor | None, most: int = 4000) -> Cloud:
    """The cloud of a set with mean (D,), covariance (D, D), and rows (N, D) or None; at most `most` evenly spaced
    points."""
    points = torch.empty(0, 2)
    if rows is not None:
        points = axes.project(rows[:: -(-len(rows) // most)])
    return Cloud(points, *axes.project_moments(mean, covariance))


def bootstrap(rows: Tensor, target: tuple[Tensor, Tensor], resamples: int, seed: int = 0) -> list[float]:
    """Fréchet distances to `target` (mean, covariance) of `resamples` samples drawn from the rows (N, K) with
    replacement (Efron 1979). The same seed draws the same rows, so sets of equal size can be compared pairwise."""
    random = generator(seed, "bootstrap")
    distances = []
    for _ in range(resamples):
        chosen = rows[torch.randint(len(rows), (len(rows),), generator=random)]
        centred = chosen - chosen.mean(0)
        covariance = centred.T @ centred / (len(rows) - 1)
        distances.append(frechet_distance(chosen.mean(0), covariance, *target))
    return distances


def interval(value: float, resampled: list[float]) -> list[float]:
    """The middle 95 % of resampled values, shifted so that their mean is `value`: resampling adds about the same bias
    to every distance as sampling did before (Efron & Tibshirani 1993, ch. 10). The lower end is at least 0."""
    data = torch.tensor(resampled, dtype=torch.float64)
    return [max(value + (torch.quantile(data, p / 100) - data.mean()).item(), 0.0) for p in INTERVAL]
