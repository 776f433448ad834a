"""Improved precision and recall (Kynkäänniemi et al. 2019).

The ball of a row has its k-th nearest neighbour in the same set on its surface. Precision is the share of samples that
are in the ball of any reference, recall the share of references that are in the ball of any sample; surfaces included.

Squared distances are |x|² + |y|² - 2·x·y in float32, after subtracting the references' mean. With s = 8·√D·2^-24 their
error is usually below s·(|x|² + |y|²). Distances below that bound are set to 0, so that equal rows are at distance 0.
Limits of this:

- A row closer than the error to a ball's surface may be on either side. For typical features this is one row in 10⁵.
- Rows closer to each other than √(2·s) of their distance from the mean count as equal: 0.7 % for 2,048 features.
- Features above about 10^18 are refused, and squares below 10^-38 are 0.
"""

import math
from dataclasses import dataclass
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from ldit.errors import EvaluationError
from ldit.eval.metrics.rows import two_sets
from ldit.precision import unrounded

NEIGHBOURS = 3
CPU_TILE, TILE = 1024, 4096  # the distances of a CPU's tile fit its cache; other devices need more work at a time


@dataclass(frozen=True, eq=False)
class PrecisionRecall:
    precision: float
    recall: float
    reached: Tensor
    """(N,) bool on the CPU: which samples are in the ball of any reference; precision is their share."""


def precision_recall(
    samples: Tensor, references: Tensor, neighbours: int = NEIGHBOURS, tile: int | None = None
) -> PrecisionRecall:
    """Precision and recall of samples (N, D) and references (M, D), in float32 on the samples' device.

    A row is not its own neighbour, but an equal row is, at distance 0. Memory besides the features: their centred copy,
    (N + M)·D·4 bytes, and 16·tile² bytes; `tile` is 1,024 on a CPU and 4,096 elsewhere unless given. Work: (N + M)²·D,
    nearly all of it matrix products, without TF32. EvaluationError for a set of fewer than `neighbours` + 1 rows, rows
    that are not finite or too large, or different widths.
    """
    # Check both sets.
    samples, references = two_sets(samples.to(torch.float32), references.to(torch.float32))
    for rows, what in ((samples, "samples"), (references, "references")):
        if len(rows) <= neighbours:
            raise EvaluationError(
                f"{neighbours} nearest neighbours need at least {neighbours + 1} {what}, got {len(rows)}"
            )
    if tile is None:
        tile = CPU_TILE if samples.device.type == "cpu" else TILE
    # Radii within each set, then distances between the sets, tile by tile.
    centre = references.mean(dim=0, dtype=torch.float64).float()
    samples, references = samples - centre, references - centre
    squares, other_squares = _squares(samples), _squares(references)
    reached = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    covered = torch.zeros(len(references), dtype=torch.bool, device=samples.device)
    with unrounded():
        radii = _radii(references, other_squares, neighbours, tile)
        own_radii = _radii(samples, squares, neighbours, tile)
        # The distances of a tile serve both precision and recall.
        for part in _parts(samples, tile):
            for other in _parts(references, tile):
                distances = _squared_distances(samples[part], references[other], squares[part], other_squares[other])
                reached[part] |= (distances <= radii[other]).any(dim=1)
                covered[other] |= (distances <= own_radii[part, None]).any(dim=0)
    return PrecisionRecall(reached.double().mean().item(), covered.double().mean().item(), reached.cpu())


def _squares(rows: Tensor) -> Tensor:
    """(N,): squared length of each row."""
    return torch.cat([part.square().sum(dim=1) for part in rows.split(TILE)])


def _radii(rows: Tensor, squares: Tensor, neighbours: int, tile: int) -> Tensor:
    """(N,): squared distance to the k-th nearest other row. Each pair of tiles is computed once, for both its sides."""
    nearest = rows.new_full((len(rows), neighbours), torch.inf)
    for part, other in combinations_with_replacement(_parts(rows, tile), 2):
        distances = _squared_distances(rows[part], rows[other], squares[part], squares[other])
        if part == other:
            distances.fill_diagonal_(torch.inf)  # exclude a row itself, by its index: other rows may be equal
        else:
            nearest[other] = _smallest(nearest[other], distances.T.contiguous())  # topk is slow along columns
        nearest[part] = _smallest(nearest[part], distances)
    radii = nearest.amax(dim=1)
    if not radii.isfinite().all():
        raise EvaluationError("features are too large for distances between them")
    return radii


def _smallest(known: Tensor, distances: Tensor) -> Tensor:
    """(R, k): the k smallest of `known` (R, k) and `distances` (R, C) in each row."""
    nearest = distances.topk(min(known.shape[1], distances.shape[1]), dim=1, largest=False).values
    return torch.cat([known, nearest], dim=1).topk(known.shape[1], dim=1, largest=False).values


def _squared_distances(x: Tensor, y: Tensor, x_squares: Tensor, y_squares: Tensor) -> Tensor:
    """Squared distances (X, Y) of centred rows (X, D) and (Y, D); those within rounding of 0 are 0."""
    squares = x_squares[:, None] + y_squares  # (X, Y)
    distances = torch.addmm(squares, x, y.T, alpha=-2.0)
    rounding = 8.0 * math.sqrt(x.shape[1]) * 2.0**-24
    return distances.masked_fill_(distances < squares.mul_(rounding), 0.0)


def _parts(rows: Tensor, tile: int) -> list[slice]:
    return [slice(first, min(first + tile, len(rows))) for first in range(0, len(rows), tile)]
