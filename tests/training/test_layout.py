"""Which part of a tensor a process holds, and putting whole tensors or rows into it."""

import random

import pytest
import torch
from torch import Tensor, nn

from ldit.errors import ConfigError
from ldit.parallel.layout import Layout, view
from ldit.training.weights import Weights

ROWS = (0, 1, 2, 3, 5, 7, 8, 9)


def chunk(full: Tensor, parts: int, index: int) -> Tensor:
    """torch.chunk, which gives fewer chunks than asked for where there is nothing left."""
    chunks = full.chunk(parts)
    return chunks[index] if index < len(chunks) else full[:0]


@pytest.mark.parametrize("shards", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("rows", ROWS)
def test_parts_are_torchs_chunks(rows: int, shards: int) -> None:
    """Uneven sizes too: short and empty parts at the end. FSDP2 cuts in the same way."""
    full = torch.arange(rows * 3).view(rows, 3)
    layout = Layout((rows, 3), shard=shards)
    for index in range(shards):
        expected = chunk(full, shards, index)
        assert torch.equal(full[layout.part(index)], expected)
        assert layout.part_shape(index) == tuple(expected.shape)
    assert torch.equal(torch.cat([view(full, layout.part(i)) for i in range(shards)]), full)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("tp", "shards"), [(2, 1), (2, 3), (4, 2), (3, 5)])
def test_tensor_parallel_parts_are_cut_again(axis: int, tp: int, shards: int) -> None:
    """Axis `tp_axis` in equal parts first, axis 0 of what is left in chunks."""
    full = torch.arange(12 * 24).view(12, 24)
    layout = Layout((12, 24), axis, tp, shards)
    for j in range(tp):
        own = full.chunk(tp, dim=axis)[j]
        for i in range(shards):
            assert torch.equal(full[layout.part(i, j)], chunk(own, shards, i))
    assert layout.copies == 1 and all(layout.sent_by(i, j) for i in range(shards) for j in range(tp))


def test_what_is_not_cut_is_held_by_all_and_sent_by_one() -> None:
    layout = Layout((5,), None, tp=3, shard=2)
    assert layout.copies == 3 and [layout.sent_by(0, j) for j in range(3)] == [True, False, False]
    assert [layout.part(1, j) for j in range(3)] == [(slice(3, 5),)] * 3
    scalar = Layout(())
    assert scalar.part() == () and view(torch.tensor(3.0), scalar.part()).item() == 3.0


class Two(nn.Module):
    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(rows, columns))
        self.bias = nn.Parameter(torch.empty(rows))


def held(layouts: dict[str, Layout], place: tuple[int, int]) -> Weights:
    """Weights of one process of several: modules with the part's shapes stand for the sharded network."""
    with torch.device("meta"):
        model = Two(*layouts["table"].part_shape(*place))
        model.bias = nn.Parameter(torch.empty(layouts["bias"].part_shape(*place)))
    weights = Weights(model, layouts, place=place)
    weights.fill(lambda name, layout, part: torch.full([s.stop - s.start for s in part], -1.0))
    return weights


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("seed", range(3))
def test_put_reaches_exactly_the_rows_held(axis: int | None, seed: int) -> None:
    """Rows of a table, each process its own; together they make the table that one process would hold."""
    drawn = random.Random(seed)
    rows, tp, shards = 12, 1 if axis is None else 2, 5
    layouts = {"table": Layout((rows, 4), axis, tp, shards), "bias": Layout((rows,), None, tp, shards)}
    chosen = drawn.sample(range(rows), 7)
    value = torch.randn(len(chosen), 4, generator=torch.Generator().manual_seed(seed))
    bias = torch.arange(float(rows))
    expected = torch.full((rows, 4), -1.0)
    expected[chosen] = value
    for place in [(i, j) for i in range(shards) for j in range(tp)]:
        weights = held(layouts, place)
        weights.put("table", value, chosen)
        weights.put("bias", bias)
        table, own = (dict(zip(weights.names, weights.masters, strict=True))[name] for name in ("table", "bias"))
        assert torch.equal(table, expected[layouts["table"].part(*place)])
        assert torch.equal(own, bias[layouts["bias"].part(*place)])


def test_put_of_a_whole_tensor_and_publish() -> None:
    """In bf16 the network follows when it is told, and only then."""
    with torch.device("meta"):
        model = Two(3, 2)
    weights = Weights(model, {"table": Layout((3, 2)), "bias": Layout((3,))}, compute=torch.bfloat16)
    weights.fill(lambda name, layout, part: torch.zeros(layout.shape))
    weights.put("table", torch.full((3, 2), 1.001))
    weights.put("table", torch.tensor([[5.0, 6.0]]), [1])
    assert model.table.detach().abs().max() == 0
    weights.sync_to_model()
    assert model.table.detach().tolist() == [[1.0, 1.0], [5.0, 6.0], [1.0, 1.0]]
    assert weights.masters[0][0, 0].item() == pytest.approx(1.001, rel=1e-7)


def test_gradients_in_low_precision_are_added_in_fp32() -> None:
    """A thousand micro-batches of gradient 1 + 2^-7: bf16 sums would stand still at 256."""
    with torch.device("meta"):
        model = Two(2, 2)
    weights = Weights(model, {"table": Layout((2, 2)), "bias": Layout((2,))}, compute=torch.bfloat16)
    weights.fill(lambda name, layout, part: torch.ones(layout.shape))
    for _ in range(1000):
        (model.table * torch.tensor(1 + 2**-7, dtype=torch.bfloat16)).sum().backward()
        assert model.table.grad is None
    table, bias = weights.gradients()
    assert table.dtype == torch.float32 and torch.equal(table, torch.full((2, 2), 1000 * (1 + 2**-7)))
    assert torch.equal(bias, torch.zeros(2))  # never came by
    weights.zero_grad()
    assert all(m.grad is None for m in weights.masters)


def test_worlds_have_a_shape() -> None:
    from ldit.config.sections import ParallelConfig
    from ldit.parallel.world import shape

    good = {(1, 1, 0, 1): (1, 1, 1), (8, 1, 0, 1): (1, 8, 1), (8, 2, 0, 1): (1, 4, 2), (8, 2, 2, 2): (2, 2, 2),
            (8, 1, 0, 8): (8, 1, 1), (6, 3, 0, 2): (2, 1, 3)}  # fmt: skip
    for (size, tp, shard, replicate), expected in good.items():
        assert shape(ParallelConfig(tp=tp, shard=shard, replicate=replicate), size) == expected
    for size, tp, shard, replicate in [(1, 2, 0, 1), (4, 3, 0, 1), (4, 1, 3, 1), (2, 1, 0, 4), (8, 2, 2, 1)]:
        with pytest.raises(ConfigError, match=f"parallel.tp {tp} does not fit {size} process"):
            shape(ParallelConfig(tp=tp, shard=shard, replicate=replicate), size)
