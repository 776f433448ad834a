"""Batch normalisation folded into convolutions, and the strict reading of published names."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldit.errors import EvaluationError
from ldit.eval.extractors.folded import Folded, Place, fill

State = dict[str, Tensor]


def state(seed: int = 0) -> State:
    source = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=source)  # noqa: E731
    return {
        "conv.weight": draw(6, 2, 3, 3),
        "bn.weight": draw(6),
        "bn.bias": draw(6),
        "bn.running_mean": draw(6),
        "bn.running_var": draw(6).abs(),
        "bn.num_batches_tracked": torch.tensor(7),
        "fc.weight": draw(5, 6),
        "fc.bias": draw(5),
    }


def filled(given: State) -> tuple[Folded, nn.Linear]:
    unit, head = Folded((4, 6), (3, 3), 2, (1, 0), groups=2, before=(0, 1, 0, 0)), nn.Linear(6, 5)
    fill(given, [Place(unit, "conv", "bn")], head, "fc", "some.pth")
    return unit, head


def test_folding_is_the_normalisation() -> None:
    """In float64 from the formula, eps 1e-3; 18 products and sums in fp32."""
    given = state()
    given["bn.running_var"][0] = 0.0  # where a wrong eps shows
    unit, head = filled(given)
    x = torch.randn(3, 4, 9, 8, generator=torch.Generator().manual_seed(1))
    bare = F.conv2d(F.pad(x.double(), (0, 1)), given["conv.weight"].double(), None, 2, (1, 0), groups=2)
    named = (given[f"bn.{leaf}"].double() for leaf in ("running_mean", "running_var", "weight", "bias"))
    expected = F.batch_norm(bare, *named, training=False, eps=1e-3).relu()
    found = unit(x)
    assert found.dtype == torch.float32 and found.shape == expected.shape == (3, 6, 5, 4)
    scale = expected.amax((0, 2, 3), keepdim=True).clamp(min=1.0)
    assert float(((found - expected).abs() / scale).max()) < 20 * torch.finfo(torch.float32).eps
    assert torch.equal(head.weight, given["fc.weight"]) and torch.equal(head.bias, given["fc.bias"])
    assert head.weight.data_ptr() != given["fc.weight"].data_ptr()  # which may be a mapped file


def test_counts_may_be_absent() -> None:
    given = state()
    with_counts, _ = filled(given)
    del given["bn.num_batches_tracked"]
    without, _ = filled(given)
    assert torch.equal(with_counts.weight, without.weight) and torch.equal(with_counts.bias, without.bias)


@pytest.mark.parametrize("name", [name for name in state() if "tracked" not in name])
def test_each_entry_is_needed(name: str) -> None:
    given = state()
    del given[name]
    with pytest.raises(EvaluationError, match=rf"^some\.pth lacks {name}$"):
        filled(given)


@pytest.mark.parametrize("name", [name for name in state() if "tracked" not in name])
def test_each_shape_is_needed(name: str) -> None:
    """Also those that would broadcast."""
    given = state()
    given[name] = given[name][:1]
    with pytest.raises(EvaluationError, match=rf"^some\.pth: {name} has shape \(1,.*\), the network needs \("):
        filled(given)


@pytest.mark.parametrize("name", ["AuxLogits.fc.weight", "bn.weight.more", "fc.num_batches_tracked"])
def test_nothing_else_is_taken(name: str) -> None:
    with pytest.raises(EvaluationError, match=rf"^some\.pth: {name} is not a tensor of this network$"):
        filled({**state(), name: torch.zeros(3)})


def test_whole_numbers_are_refused() -> None:
    with pytest.raises(EvaluationError, match=r"bn\.bias is a torch\.int64 tensor"):
        filled({**state(), "bn.bias": torch.zeros(6, dtype=torch.int64)})


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("bn.running_var", -1.0, "conv.weight"),
        ("bn.running_mean", float("inf"), "bn.bias"),
        ("fc.bias", float("nan"), "fc.bias"),
        ("conv.weight", float("nan"), "conv.weight"),
    ],
)
def test_numbers_that_spoil_every_feature_are_refused(name: str, value: float, said: str) -> None:
    given = state()
    given[name].view(-1)[1] = value
    with pytest.raises(EvaluationError, match=rf"^some\.pth: {said} is not finite after folding the normalisation$"):
        filled(given)
