"""The Fréchet distance against closed forms, on singular covariances, and what it refuses.

In two dimensions tr (A·B)^½ = (tr A·B + 2·(det A·det B)^½)^½, whether A and B commute or not. Blocks of two along the
diagonal, turned by any orthogonal matrix, make closed forms of every dimension.
"""

import math

import pytest
import torch
from torch import Tensor

from ldit.errors import EvaluationError
from ldit.eval.metrics import frechet
from ldit.eval.metrics.frechet import frechet_distance
from ldit.eval.metrics.moments import Moments

RELATIVE = 1e-6


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def turned(matrix: Tensor, seed: int = 5) -> Tensor:
    """Q·M·Q^T with a random orthogonal Q, made of reflections, which are orthogonal to rounding in any dimension."""
    for vector in draw(8, len(matrix), seed=seed):
        v = vector / vector.norm()
        matrix = matrix - 2.0 * torch.outer(v, v @ matrix)
        matrix = matrix - 2.0 * torch.outer(matrix @ v, v)
    return matrix


def blocks(width: int, seed: int, empty: int = 0) -> Tensor:
    """(width // 2, 2, 2) positive definite matrices of sizes from 1e-3 to 1, the first `empty` of them zero."""
    factors = draw(width // 2, 2, 2, seed=seed)
    sizes = torch.logspace(-3, 0, width // 2, dtype=torch.float64)
    made = (
        factors
        @ factors.mT
        * sizes[torch.randperm(width // 2, generator=torch.Generator().manual_seed(seed))][:, None, None]
    )
    made[:empty] = 0.0
    return made


def common(a: Tensor, b: Tensor) -> float:
    """Sum of tr (A·B)^½ over blocks."""
    traces = (a @ b).diagonal(dim1=1, dim2=2).sum(1)
    return float((traces + 2.0 * (torch.linalg.det(a) * torch.linalg.det(b)).clamp(min=0.0).sqrt()).sqrt().sum())


def trace(a: Tensor) -> float:
    return float(a.diagonal(dim1=1, dim2=2).sum())


@pytest.mark.timeout(900)  # 2,048 wide: seconds on a quiet core, over a minute on a busy one
@pytest.mark.parametrize("width", [2, 3, 64, 2048])
def test_covariances_that_do_not_commute(width: int) -> None:
    """A quarter of A's directions and another quarter of B's hold nothing, in the larger widths."""
    a, b = blocks(width, 1, width // 8), blocks(width, 2, width // 8).flip(0)
    offset = draw(width, seed=3) * 0.01
    expected = float(offset.square().sum()) + trace(a) + trace(b) - 2.0 * common(a, b)
    matrices = [torch.block_diag(*x, *([torch.zeros(1, 1)] * (width % 2))) for x in (a, b)]
    if width % 2:
        matrices[0][-1, -1], matrices[1][-1, -1] = 0.5, 0.02
        expected += (math.sqrt(0.5) - math.sqrt(0.02)) ** 2
    first, second = (turned(m) for m in matrices)
    assert not torch.allclose(first @ second, second @ first)
    mean = draw(width, seed=4)
    found = frechet_distance(mean, first, mean + offset, second)
    assert found == pytest.approx(expected, rel=RELATIVE)


@pytest.mark.parametrize("width", [2, 3, 64])
def test_covariances_that_commute(width: int) -> None:
    """|offset|² + sum of (√a - √b)²; where one is zero the other's variance counts whole."""
    a, b = draw(width, seed=1).square(), draw(width, seed=2).square()
    a[: width // 2], b[-1] = 0.0, 0.0
    offset = draw(width, seed=3)
    expected = float(offset.square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    found = frechet_distance(torch.zeros(width), turned(a.diag()), offset, turned(b.diag()))
    assert found == pytest.approx(expected, rel=RELATIVE)


@pytest.mark.parametrize("width", [2, 3, 64])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_multiples_of_the_identity(width: int, scale: float) -> None:
    one = torch.eye(width) * scale
    zero = torch.zeros(width)
    assert frechet_distance(zero, 4.0 * one, zero, 9.0 * one) == pytest.approx(width * scale, rel=RELATIVE)
    assert frechet_distance(zero, one, zero, 0.0 * one) == pytest.approx(width * scale, rel=RELATIVE)
    assert frechet_distance(zero, 0.0 * one, torch.ones(width), 0.0 * one) == width


def test_equal_gaussians_are_at_distance_zero() -> None:
    """To the rounding of traces, and never below."""
    covariance = turned(draw(64).square().diag())
    for seed in range(20):
        noise = draw(64, 64, seed=seed) * 1e-16
        other = covariance + noise + noise.T
        assert 0.0 <= frechet_distance(torch.ones(64), covariance, torch.ones(64), other) < 1e-12 * covariance.trace()


def test_what_counts_as_rounding_in_few_dimensions() -> None:
    """Eigenvalues up to 64·2^-52 of the largest are none: the root of one of 20 would be 7e-8 of the distance."""
    rounding, zero = 2.0**-52, torch.zeros(3)
    for times, common in ((20.0, 2.0), (100.0, 2.0 + (100.0 * rounding) ** 0.5)):
        small = torch.tensor([1.0, 1.0, times * rounding], dtype=torch.float64).diag()
        found = frechet_distance(zero, small, zero, torch.eye(3))
        assert found == pytest.approx(5.0 + times * rounding - 2.0 * common, rel=1e-12)


def test_it_is_symmetric_and_of_single_precision_too() -> None:
    a, b = turned(draw(9, seed=1).square().diag(), 1), turned(draw(9, seed=2).square().diag(), 2)
    mean = draw(9, seed=3)
    one = frechet_distance(torch.zeros(9), a, mean, b)
    assert frechet_distance(mean, b, torch.zeros(9), a) == pytest.approx(one, rel=1e-12)
    assert frechet_distance(torch.zeros(9), a.float(), mean.float(), b.float()) == pytest.approx(one, rel=1e-5)


def moments(rows: Tensor, batch: int) -> Moments:
    found = Moments(rows.shape[1])
    for part in rows.split(batch):
        found.add(part)
    return found


@pytest.mark.parametrize("width", [3, 256])
@pytest.mark.parametrize("counts", [(2, 3), (100, 80), (1000, 300)])
def test_batches_move_it_by_rounding_alone(counts: tuple[int, int], width: int) -> None:
    """With fewer images than features most eigenvalues are zero: roots of their rounding would show at 1e-6 of the
    distance. The bound is 1e-10."""
    spread = torch.logspace(-2, 0, width)
    rows = [draw(count, width, seed=count).float() * spread for count in counts]
    found = []
    for batches in ((1000, 1000), (64, 1), (7, 33), (1, 64)):
        one, other = (moments(x, batch) for x, batch in zip(rows, batches, strict=True))
        found.append(frechet_distance(one.mean, one.covariance, other.mean, other.covariance))
    assert found == pytest.approx([found[0]] * 4, rel=1e-10) and found[0] > 0.0


def test_few_images_against_the_distance_of_their_spans() -> None:
    """Ranks 5 and 4 in 300 dimensions: tr (S1·S2)^½ is the sum of the singular values of X1·X2^T over the square
    roots of N - 1, of the centred rows: no covariance is needed for it."""
    x, y = draw(6, 300, seed=1), draw(5, 300, seed=2)
    x_rows, y_rows = ((z - z.mean(0)) / math.sqrt(len(z) - 1) for z in (x, y))
    expected = float(
        (x.mean(0) - y.mean(0)).square().sum() + x_rows.square().sum() + y_rows.square().sum()
        - 2.0 * torch.linalg.svdvals(x_rows @ y_rows.T).sum()
    )  # fmt: skip
    one, other = moments(x, 2), moments(y, 3)
    found = frechet_distance(one.mean, one.covariance, other.mean, other.covariance)
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("scale", [1e-320, 1e-160, 1e-20, 1e20, 1e150, 1e300, 1e308])
def test_a_number_or_an_error_at_every_scale(scale: float) -> None:
    for one, other in ((torch.eye(3), torch.ones(3, 3)), (torch.zeros(3, 3), torch.ones(3, 3))):
        mean = torch.full((3,), scale, dtype=torch.float64)
        try:
            found = frechet_distance(mean, one.double() * scale, -mean, other.double() * scale)
        except EvaluationError:
            assert scale > 1e150
        else:
            assert math.isfinite(found) and found >= 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", range(4))
def test_what_is_not_finite_is_refused(place: int, value: float) -> None:
    given = [torch.zeros(3), torch.eye(3), torch.zeros(3), torch.eye(3)]
    given[place].view(-1)[0] = value
    with pytest.raises(EvaluationError, match=r"a (mean|covariance) of the Fréchet distance is not finite"):
        frechet_distance(*given)


def test_other_shapes_are_refused() -> None:
    three, four = (torch.zeros(3), torch.eye(3)), (torch.zeros(4), torch.eye(4))
    with pytest.raises(EvaluationError, match="of 3 and 4 features"):
        frechet_distance(*three, *four)
    with pytest.raises(EvaluationError, match="covariances of 3 and 4"):
        frechet_distance(*three, three[0], four[1])
    with pytest.raises(EvaluationError, match=r"covariance of the shape \(3, 4\)"):
        frechet_distance(*three, three[0], torch.zeros(3, 4))
    with pytest.raises(EvaluationError, match=r"mean of the shape \(0,\)"):
        frechet_distance(torch.zeros(0), torch.zeros(0, 0), torch.zeros(0), torch.zeros(0, 0))


def test_a_matrix_that_is_no_covariance_is_refused_and_rounding_is_not() -> None:
    bad, rounded = torch.tensor([1.0, 1.0, -0.01]).diag(), torch.tensor([1.0, 1.0, -1e-7]).diag()
    with pytest.raises(EvaluationError, match=r"not a covariance: it has the eigenvalue -0\.01"):
        frechet_distance(torch.zeros(3), torch.eye(3), torch.zeros(3), bad)
    assert frechet_distance(torch.zeros(3), torch.eye(3), torch.zeros(3), rounded) == pytest.approx(1.0, rel=1e-6)


def test_an_eigenproblem_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(matrix: Tensor) -> Tensor:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(frechet.torch.linalg, "svdvals", fail)
    with pytest.raises(EvaluationError, match="cannot be computed: did not converge"):
        frechet_distance(torch.zeros(3), torch.eye(3), torch.zeros(3), torch.eye(3))
