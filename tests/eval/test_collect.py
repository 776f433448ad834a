"""Features are kept where their images stand, whatever order they come in; what does not add up is an error."""

import pytest
import torch
from runs import ALONE
from torch import Tensor

from ldit.errors import EvaluationError
from ldit.eval.features import Features
from ldit.eval.metrics.collect import Collector


def features(rows: Tensor) -> Features:
    return Features(rows, rows[:, :2] * 3, rows[:, 1:])


def rows(count: int) -> Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("order", [(0, 3, 6), (6, 0, 3), (3, 6, 0)])
def test_rows_lie_where_their_images_stand(order: tuple[int, ...]) -> None:
    whole = rows(8)
    collector = Collector(ALONE, 8, True)
    for first in order:
        collector.add(first, features(whole[first : first + 3]))
    found = collector.merged()
    assert found.rows is not None and torch.equal(found.rows, whole)
    assert found.predicted is not None and torch.equal(found.predicted, whole[:, 1:].argmax(1))
    assert found.count == 8 and found.spatial is not None
    assert torch.allclose(found.spatial.mean, 3 * whole[:, :2].double().mean(0), atol=1e-12)


def test_what_is_not_asked_for_is_not_kept() -> None:
    for total, predicted in ((8, True), (0, False)):
        collector = Collector(ALONE, total, False)
        collector.add(0, features(rows(8)))
        found = collector.merged()
        assert found.rows is None and (found.predicted is not None) is predicted and found.count == 8


@pytest.mark.parametrize("total", [7, 9])
def test_other_images_than_were_announced(total: int) -> None:
    collector = Collector(ALONE, total, True)

    def run() -> None:
        collector.add(0, features(rows(8)))
        collector.merged()

    with pytest.raises(ValueError, match=f"^{total} images were announced"):
        run()


def test_no_images() -> None:
    with pytest.raises(EvaluationError, match="there are no images"):
        Collector(ALONE, 0, False).merged()
