"""Improved precision and recall (Kynkäänniemi et al. 2019): two sets of features as unions of balls.

A row's ball reaches to its k-th nearest neighbour in its own set. Precision is the share of samples that lie in any
reference's ball, recall the share of references that lie in any sample's; the surface belongs to a ball.

The answer is that of distances in float64, at the price of products in float32. |x|² + |y|² - 2·x·y cannot tell
distances apart that differ by less than its rounding, (D + 32)·2^-24 of |x|² + |y|² at most, which is why rows are
centred first. What that leaves undecided, some rows in a thousand of ordinary features, goes through the same product
in float64; what is undecided even there are ties, and they and the radii are sums of squared differences in float64,
which are exactly 0 for equal rows.

One thing is taken from products in float64 alone: which rows are a row's nearest. Where more than 8 others are as near
as the k-th within 12·(D + 32)·2^-53 of |x|², two millionths of the row's distance from the references' mean for 2,048
features, the radius may be too large by that much. Features have no such neighbours, unless a few of them lie a million
times farther out than the others do from each other.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ldit.errors import EvaluationError
from ldit.eval.metrics.rows import two_sets
from ldit.precision import unrounded

NEIGHBOURS, TILE = 3, 10_000
_SPARE = 8  # candidates beyond k that are looked at in float64
_DIFFERENCES = 1 << 21  # in float64 at once
_ROWS = 1024  # that go through products in float64 at once
_TIED = 64  # whose undecided pairs are listed at once
_OTHER_ROUNDINGS = 32  # beside those of a product's D terms: centring, squares, sums, radii
_TIE = 1e-12  # relative: two sums of the same squares may differ by their order


@dataclass(frozen=True, eq=False)
class PrecisionRecall:
    precision: float
    recall: float
    reached: Tensor
    """(N,) bool on the CPU: which samples lie in a reference's ball; precision is their share."""


def precision_recall(
    samples: Tensor, references: Tensor, neighbours: int = NEIGHBOURS, tile: int = TILE
) -> PrecisionRecall:
    """Of all rows of samples (N, D) and references (M, D), float32, on the samples' device.

    A row is no neighbour of itself; an equal row is, at distance 0. Memory: (N + M)·D·4 bytes of features, and beside
    them some 4·tile² + 16·tile·D bytes whatever N and M: 0.7 GB for 10,000 and 2,048. The work is (N² + M²)·D +
    4·N·M·D at most, nearly all of it products of matrices in float32, tf32 switched off. EvaluationError for a set of
    fewer than `neighbours` + 1 rows, a row that is not finite, or other widths.
    """
    samples, references = two_sets(samples.to(torch.float32), references.to(torch.float32))
    for rows, what in ((samples, "samples"), (references, "references")):
        if len(rows) <= neighbours:
            raise EvaluationError(
                f"{neighbours} nearest neighbours need at least {neighbours + 1} {what}, got {len(rows)}"
            )
    with unrounded():
        frame = _Frame(samples, references, tile)
        reached = _inside(samples, references, _radii(references, frame, neighbours), frame)
        covered = _inside(references, samples, _radii(samples, frame, neighbours), frame)
    precision, recall = (int(inside.sum()) / len(inside) for inside in (reached, covered))
    return PrecisionRecall(precision, recall, reached.cpu())


class _Frame:
    """Rows as products see them: about the references' mean, the largest number between 1/2 and 1."""

    def __init__(self, samples: Tensor, references: Tensor, tile: int) -> None:
        self.tile, self.width = tile, samples.shape[1]
        self.centre = references.mean(dim=0, dtype=torch.float64).to(torch.float32)
        parts = [rows[part] for rows in (samples, references) for part in self.parts(len(rows))]
        largest = max(float((part - self.centre).abs().max()) for part in parts)
        if not math.isfinite(largest):
            raise EvaluationError("features are too large for distances between them")
        # A power of two changes no bit; within 2^±120 it is itself a float32.
        self.power = min(max(-math.frexp(largest)[1], -120), 120)

    def parts(self, count: int) -> list[slice]:
        return [slice(first, min(first + self.tile, count)) for first in range(0, count, self.tile)]

    def put(self, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Rows in the frame, and their squared lengths in float64."""
        placed = (rows.to(dtype) - self.centre.to(dtype)).mul_(2.0**self.power)
        return placed, torch.linalg.vector_norm(placed, dim=1, dtype=torch.float64).square()

    def slack(self, dtype: torch.dtype) -> tuple[float, float]:
        """What a squared distance may be off by: so much of |x|² + |y|², and what sums lose below the least number."""
        roundings, numbers = self.width + _OTHER_ROUNDINGS, torch.finfo(dtype)
        return roundings * numbers.eps / 2.0, 4.0 * roundings * numbers.tiny


def _squares(x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> Tensor:
    """(X, Y) squared distances of placed rows by the product, in their dtype."""
    distances = torch.addmm(y[1].to(y[0].dtype)[None], x[0], y[0].T, alpha=-2.0)
    return distances.add_(x[1].to(x[0].dtype)[:, None])


class _Nearest:
    """The `kept` nearest rows of each of `count` rows so far: their distances and places."""

    def __init__(self, count: int, kept: int, dtype: torch.dtype, device: torch.device) -> None:
        self.kept = kept
        self.distances = torch.full((count, kept), torch.inf, dtype=dtype, device=device)
        self.places = torch.zeros((count, kept), dtype=torch.int64, device=device)

    def offer(self, part: slice, distances: Tensor, first: int) -> None:
        """Distances of the rows of `part` to those from `first` on."""
        found, where = distances.topk(min(self.kept, distances.shape[1]), dim=1, largest=False, sorted=False)
        both = torch.cat([self.distances[part], found], dim=1)
        self.distances[part], at = both.topk(self.kept, dim=1, largest=False, sorted=False)
        self.places[part] = torch.cat([self.places[part], where + first], dim=1).gather(1, at)


def _radii(rows: Tensor, frame: _Frame, neighbours: int) -> Tensor:
    """(N,) float64: squared distances to the k-th nearest other row. Each pair of tiles is multiplied once."""
    kept = min(neighbours + _SPARE, len(rows) - 1)
    nearest = _Nearest(len(rows), kept, torch.float32, rows.device)
    squares = torch.empty(len(rows), dtype=torch.float64, device=rows.device)
    parts = frame.parts(len(rows))
    for i, left in enumerate(parts):
        x = frame.put(rows[left], torch.float32)
        squares[left] = x[1]
        for right in parts[i:]:
            distances = _squares(x, x if right == left else frame.put(rows[right], torch.float32))
            if right == left:
                distances.fill_diagonal_(torch.inf)
            nearest.offer(left, distances, right.start)
            if right != left:
                nearest.offer(right, distances.T, left.start)
            del distances
    if kept < len(rows) - 1:
        unsure = _unsure(nearest, squares, frame, neighbours)
        for some in _pieces(unsure, _ROWS):
            nearest.places[some] = _nearest_places(rows, some, frame, kept)
    # Filled in place: small results that are kept between large temporaries would leave the heap in pieces.
    radii = torch.empty(len(rows), dtype=torch.float64, device=rows.device)
    for part in _few(rows, kept):
        exact = _squared_distances(rows[part], rows, nearest.places[part])
        radii[part] = exact.kthvalue(neighbours, dim=1).values
    return radii


def _unsure(nearest: _Nearest, squares: Tensor, frame: _Frame, neighbours: int) -> Tensor:
    """Rows whose k-th nearest may be one that was not kept. With |y|² ≤ 2·|x|² + 2·d² a distance d² is off by at most
    slack·(3·|x|² + 2·d²), and none that was not kept is below the last."""
    found = nearest.distances.double()
    last, kth = found.amax(dim=1), found.kthvalue(neighbours, dim=1).values
    relative, absolute = frame.slack(torch.float32)
    return (last - kth <= 2.0 * (relative * (3.0 * squares + 2.0 * last) + absolute)).nonzero().flatten()


def _nearest_places(rows: Tensor, chosen: Tensor, frame: _Frame, kept: int) -> Tensor:
    """(C, kept): the nearest other rows of rows[chosen], by products in float64."""
    nearest = _Nearest(len(chosen), kept, torch.float64, rows.device)
    x = frame.put(rows[chosen], torch.float64)
    for part in frame.parts(len(rows)):
        distances = _squares(x, frame.put(rows[part], torch.float64))
        own = ((chosen >= part.start) & (chosen < part.stop)).nonzero().flatten()
        distances[own, chosen[own] - part.start] = torch.inf
        nearest.offer(slice(None), distances, part.start)
    return nearest.places


def _inside(points: Tensor, centres: Tensor, radii: Tensor, frame: _Frame) -> Tensor:
    """(N,) bool: points within any ball, |x - y|² ≤ r². A point that has been found inside is looked at no more."""
    inside = torch.zeros(len(points), dtype=torch.bool, device=points.device)
    for part in frame.parts(len(points)):
        left = torch.arange(part.start, part.stop, device=points.device)
        for balls in frame.parts(len(centres)):
            if not len(left):
                break
            found, near, _ = _reaching(points[left], centres[balls], radii[balls], frame, torch.float32)
            for some in _pieces(near, _ROWS):
                found[some] = _decided(points[left[some]], centres[balls], radii[balls], frame)
            inside[left[found]] = True
            left = left[~found]
    return inside


def _decided(points: Tensor, centres: Tensor, radii: Tensor, frame: _Frame) -> Tensor:
    """(P,) bool: the same for some points, by products in float64, and ties by differences: the likeliest centre of
    each point first, then all that come into question."""
    found, near, best = _reaching(points, centres, radii, frame, torch.float64)
    if len(near):
        tied = _within(points, centres, radii, near, best[near])
        found[near[tied]] = True
        near = near[~tied]
    for some in _pieces(near, _TIED):
        rows, columns = _candidates(points[some], centres, radii, frame)
        sound = _within(points[some], centres, radii, rows, columns)
        found[some[rows[sound]]] = True
    return found


def _sides(
    points: Tensor, centres: Tensor, radii: Tensor, frame: _Frame, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """|x|² + |y|² - 2·x·y ≤ r² as x·y - (|y|² - r²)/2 ≥ |x|²/2, by the product: the left side (X, Y), less what it may
    be too large by; what to add to it (Y,) for the most it can be; the most and the least of the right side (X,)."""
    relative, absolute = frame.slack(dtype)
    (x, x_squares), (y, y_squares) = frame.put(points, dtype), frame.put(centres, dtype)
    bias = (radii * 4.0**frame.power - y_squares * (1.0 + relative)) / 2.0
    most, least = (x_squares * (1.0 + sign * relative) / 2.0 + sign * absolute for sign in (1.0, -1.0))
    left = torch.addmm(bias.to(dtype)[None], x, y.T)
    return left, (y_squares * relative).to(dtype), most.to(dtype), least.to(dtype)


def _reaching(
    points: Tensor, centres: Tensor, radii: Tensor, frame: _Frame, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(P,) bool, points that are certainly inside a ball; places of the others that may be; the likeliest centre of
    each point."""
    left, margin, most, least = _sides(points, centres, radii, frame, dtype)
    best, at = left.max(dim=1)
    found = best >= most
    return found, (~found & (best + margin.max() >= least)).nonzero().flatten(), at


def _candidates(points: Tensor, centres: Tensor, radii: Tensor, frame: _Frame) -> tuple[Tensor, Tensor]:
    """Pairs (point, centre) that float64 products cannot tell from pairs within reach."""
    left, margin, _, least = _sides(points, centres, radii, frame, torch.float64)
    rows, columns = (left + margin >= least[:, None]).nonzero().unbind(1)
    return rows, columns


def _within(points: Tensor, centres: Tensor, radii: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(P,) bool: whether point rows[p] lies in the ball of centre columns[p], by differences in float64."""
    count = max(_DIFFERENCES // points.shape[1], 1)
    pairs = zip(rows.split(count), columns.split(count), strict=True)
    return torch.cat(
        [_squared_distances(points[r], centres, c[:, None])[:, 0] <= radii[c] * (1.0 + _TIE) for r, c in pairs]
    )


def _pieces(places: Tensor, size: int) -> tuple[Tensor, ...]:
    """Of an empty tensor none: torch's split would give one."""
    return places.split(size) if len(places) else ()


def _few(rows: Tensor, columns: int) -> Iterator[slice]:
    """Ranges of rows whose differences from `columns` others each are few enough to be held in float64."""
    count = max(_DIFFERENCES // (rows.shape[1] * columns), 1)
    return (slice(first, first + count) for first in range(0, len(rows), count))


def _squared_distances(rows: Tensor, others: Tensor, places: Tensor) -> Tensor:
    """(B, k) float64: of rows (B, D) from others[places], with places (B, k)."""
    chosen = others[places.flatten()].view(*places.shape, others.shape[1])
    return (rows[:, None].double() - chosen.double()).square().sum(dim=2)
