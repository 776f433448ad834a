"""The inference copy computes what the network does, whatever is switched on and whoever shares the batch."""

import copy
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from sampling.inference import LABELS, TIMES, batch, error, prepared, tiny
from test_variants import TINY
from torch import Tensor, nn

from ldit.config.model import ClassModelConfig, OriginalDiTConfig, TextModelConfig
from ldit.errors import RequestError
from ldit.nn.build import build_model
from ldit.nn.dit import DiT
from ldit.nn.layers import Attention
from ldit.nn.rope import GridScale
from ldit.nn.tokens import rope_table
from ldit.sampling.fast.conditioning_cache import ModulationCache
from ldit.sampling.fast.options import InferenceOptions
from ldit.sampling.fast.packed import is_packable, joined
from ldit.sampling.fast.prepare import prepare

# Two sums of the same fp32 numbers in another order, through two blocks: a few roundings of 1.2e-7.
TOLERANCE = 2e-6
VARIANTS: list[dict[str, Any]] = [
    {},
    {"qk_norm": True, "n_kv_heads": 2},
    {"qk_norm": "head", "n_kv_heads": 1},
    {"rope": "2d"},
    {"class_dropout_prob": 0.0},
    {"num_classes": 0},
    {"learn_sigma": False, "patch_size": 4, "in_channels": 3},
    {"shared_adaln": True, "class_tokens": 3},
    {"value_residual": True, "n_kv_heads": 2},
    {"fine_layers": 1, "rope": "2d", "class_tokens": 2, "mid_layer": 1},
]


pytestmark = pytest.mark.usefixtures("one_thread")  # bits are compared


@pytest.mark.parametrize("planned", [True, False])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_same_outputs(changes: dict[str, Any], packed: bool, planned: bool) -> None:
    model = tiny(**changes)
    x, t, y = batch(model)
    expected, given = model(x, t, y), x.clone()
    network = prepared(model, packed=packed)
    if planned:
        network.plan(product(TIMES, y.tolist()))
    assert error(network(x, t, y), expected) <= TOLERANCE
    assert error(network(x, t, y), expected) <= TOLERANCE, "a second call"
    assert torch.equal(model(x, t, y), expected) and torch.equal(x, given), "the model itself stays as it was"


@pytest.mark.parametrize("changes", [{}, {"fine_layers": 1}, {"shared_adaln": True, "class_tokens": 2}], ids=str)
def test_both_heads(changes: dict[str, Any]) -> None:
    model = tiny(mid_layer=1, **changes)
    x, t, y = batch(model)
    expected, found = model(x, t, y, mid=True), prepared(model, packed=True)(x, t, y, mid=True)
    assert len(found) == 2 and all(error(a, b) <= TOLERANCE for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("changes", [{}, {"fine_layers": 1}, {"fine_layers": 1, "class_tokens": 2}], ids=str)
@pytest.mark.parametrize("rope", ["raster", "2d"])
def test_positions_of_larger_images(changes: dict[str, Any], rope: str) -> None:
    """Both levels are scaled alike: a row of the trunk has half as many columns, and stays as far from the next."""
    model = tiny(rope=rope, **changes)
    network, t, y = prepared(model), torch.tensor([3.0]), torch.tensor([5])
    x, grid = torch.randn(1, 4, 12, 16), GridScale(ntk_rows=1.5, columns=2.0, stride=4 if rope == "raster" else None)
    assert error(network(x, t, y, grid=grid), model(x, t, y, grid=grid)) <= TOLERANCE
    table = model.positions(x, grid)
    count = model.class_tokens
    levels = [(3, 4), (6, 8)] if changes.get("fine_layers") else [(6, 8)]
    assert len(table) == sum(count + rows * columns for rows, columns in levels)
    assert torch.equal(table[:count], torch.tensor([1.0, 0.0]).expand(count, 4, 2))
    rows, columns = levels[0]
    stride = None if grid.stride is None else grid.stride // (2 if len(levels) == 2 else 1)
    expected = rope_table(rope, rows, columns, 8, torch.device("cpu"), replace(grid, stride=stride))
    assert torch.equal(table[count : count + rows * columns], expected)


def test_other_sizes_and_scaled_positions() -> None:
    model = tiny(rope="2d")
    network = prepared(model)
    t, y = torch.tensor([3.0]), torch.tensor([5])
    grid = GridScale(rows=1.5, ntk_columns=2.0, softmax=1.1)
    for shape in ((1, 4, 4, 12), (1, 4, 16, 8)):
        x = torch.randn(shape)
        assert error(network(x, t, y), model(x, t, y)) <= TOLERANCE
        assert error(network(x, t, y, grid=grid), model(x, t, y, grid=grid)) <= TOLERANCE
        assert error(network(x, t, y, grid=grid), model(x, t, y)) > 1e-3


@pytest.mark.parametrize("int8", [False, True])
def test_a_row_does_not_depend_on_its_batch(int8: bool) -> None:
    """Bit for bit at the same batch shape: other neighbours, another place, other labels and steps planned beside."""
    model = tiny(dim=64, multiple_of=64, qk_norm=True)
    x, t, y = batch(model, 6)
    out = prepared(model, int8=int8)(x, t, y)
    order = torch.tensor([4, 2, 0, 5, 3, 1])
    network = prepared(model, int8=int8)
    network.plan(product([*range(40), *TIMES], [5, 0, 4]))
    assert torch.equal(network(x[order], t[order], y[order])[order.argsort()], out)
    x[1:], y[1:] = 3.0 * torch.randn_like(x[1:]), 2
    network.plan(product([TIMES[0]], [int(y[0])]))
    assert torch.equal(network(x, t, y)[0], out[0])


def test_planned_and_unplanned_are_the_same_bits() -> None:
    model = tiny()
    x, _, y = batch(model)
    network = prepared(model)
    times = [0.1, 333.3, 17.0]  # not all of them numbers that fp32 holds
    for time in times:
        t = torch.full((3,), time)
        network.plan([])
        unplanned = network(x, t, y)
        network.plan(product([*times, float("nan")], LABELS))
        assert torch.equal(network(x, t, y), unplanned)
        assert error(unplanned, model(x, t, y)) <= TOLERANCE


def test_planned_rows_are_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made together, of more than the weights are large as many as those at a time."""
    made: list[int] = []
    real = ModulationCache.rows

    def rows(self: ModulationCache, pairs: Any) -> Tensor:
        made.append(len(pairs))
        return real(self, pairs)

    monkeypatch.setattr(ModulationCache, "rows", rows)
    model = tiny()
    x, t, y = batch(model)
    network = prepared(model)
    # What fp32 does not hold, and the time of clean data.
    network.plan(product([*TIMES[:2], 333.3, float("nan")], LABELS))
    t[2] = 333.3
    network(x, t, y)
    network(x[:1], t[:1], y[:1])
    assert made == [9]
    network(x, torch.full((3,), 5.0), torch.tensor([1, 1, 2]))
    assert made == [9, 2]
    network.plan(product([*TIMES[:2], 333.3], LABELS))  # the same again: what was made stays
    network(x, t, y)
    assert made == [9, 2]
    assert network.modulations.most == model.config.cond_dim == 32
    network.plan(product(range(12), LABELS))
    for time in range(12):
        network(x, torch.full((3,), float(time)), y)
    assert made == [9, 2, 32, 6]  # times 0 to 9 and two rows of 10; then 10 and 11

    def short(self: ModulationCache, pairs: Any) -> Tensor:
        if len(pairs) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return rows(self, pairs)

    monkeypatch.setattr(ModulationCache, "rows", short)
    network.plan(product(range(3), LABELS))
    expected = model(x, torch.full((3,), 1.0), y)
    assert error(network(x, torch.full((3,), 1.0), y), expected) <= TOLERANCE and made[4:] == [3]


def test_nothing_is_held_twice() -> None:
    """The model's weights are views of the joined ones: as many bytes as before, and what is changed in place holds."""
    model = tiny(n_kv_heads=2)

    def held(*modules: nn.Module) -> int:
        found = [p.untyped_storage() for module in modules for p in module.parameters()]
        return sum({storage.data_ptr(): storage.nbytes() for storage in found}.values())

    before = held(model)
    network = prepared(model, packed=True)
    assert held(model, *network.blocks) == before
    again = prepared(model, packed=True)
    assert held(model, *network.blocks, *again.blocks) == before and network.is_current()
    model.layers[0].attention.wk.weight.mul_(2.0)
    model.layers[1].feed_forward.w3.weight.mul_(0.5)
    x, t, y = batch(model)
    assert error(network(x, t, y), model(x, t, y)) <= TOLERANCE
    model.double()
    assert not network.is_current()


def test_joined_weights_that_adjoin_already_are_not_copied() -> None:
    a, b = nn.Linear(4, 3, bias=False), nn.Linear(4, 2, bias=False)
    first, second = a.weight.detach().clone(), b.weight.detach().clone()
    whole = joined([a, b])
    assert torch.equal(whole.weight, torch.cat([first, second]))
    assert joined([a, b]).weight.data_ptr() == whole.weight.data_ptr() == a.weight.data_ptr()
    assert torch.equal(joined([b, a]).weight, torch.cat([second, first]))


def test_graphs_are_for_a_gpu() -> None:
    with pytest.raises(RequestError, match="graph: CUDA graphs need a GPU, got cpu"):
        prepare(tiny(), InferenceOptions(graph=True))


def test_compiled_blocks() -> None:
    model = tiny(qk_norm=True, n_kv_heads=2)
    network = prepared(model, compiled=True)
    for rows in (3, 1, 5):
        x, t, y = batch(model, rows)
        with torch.no_grad():
            expected = model(x, t, y)
        assert error(network(x, t, y), expected) <= TOLERANCE


@pytest.mark.parametrize("packed", [False, True])
def test_compiled_blocks_stay_compiled(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the rows and sizes, 12 of one and 6 of the other: one graph for one row, one for several, and both once
    more for other sizes than the first. All blocks share them. Nothing runs eagerly."""
    graphs: list[int] = []
    compile = torch.compile

    def counting(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(0)
        place = len(graphs) - 1

        def run(*values: Any) -> Any:
            graphs[place] += 1
            return graph.forward(*values)

        return run

    monkeypatch.setattr(torch, "compile", lambda function, **how: compile(function, **{**how, "backend": counting}))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8):  # torch's own, whoever raised it before
        network = prepared(tiny(rope="2d"), compiled=True, packed=packed)
        calls = 0
        for side in (4, 8, 12, 16, 20, 24):
            for rows in (3, 1, 2, *range(4, 13)):
                network(torch.zeros(rows, 4, 8, side), torch.ones(rows), torch.zeros(rows, dtype=torch.long))
                calls += 1
        blocks = len(network.blocks)
        assert len(graphs) == 4 and sum(graphs) == calls * blocks
        others = [prepared(tiny(dim=dim, multiple_of=64), compiled=True, packed=packed) for dim in (64, 96, 128)]
        for other in others:
            for rows in (1, 2):
                other(torch.zeros(rows, 4, 8, 8), torch.ones(rows), torch.zeros(rows, dtype=torch.long))
                calls += 1
        assert sum(graphs) == calls * blocks, "other networks have room beside the first"
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["text", "dit"])
def test_other_networks_come_back_as_they_are(kind: str) -> None:
    config: Any = OriginalDiTConfig(input_size=8, hidden_size=32, depth=1, num_heads=4)
    if kind == "text":
        config = TextModelConfig(**TINY, max_seq_len=24, cap_feat_dim=12)
    model = build_model(config)
    assert prepare(model) is model


class _Doubled(DiT):
    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        return 2 * super().forward(*arguments, **keywords)


class _Negated(Attention):
    def forward(self, *arguments: Any, **keywords: Any) -> Tensor:
        return -super().forward(*arguments, **keywords)


def test_what_the_user_changed_is_kept() -> None:
    """A forward pass, attention and linears of one's own: no copy, and no joined products, in their place."""
    model = tiny()
    config = model.config
    assert isinstance(config, ClassModelConfig)
    doubled = _Doubled(config)
    assert prepare(doubled) is doubled
    model.layers[0].attention.__class__ = _Negated
    x, t, y = batch(model)
    with torch.no_grad():
        assert error(prepared(model, packed=True)(x, t, y), model(x, t, y)) < 1e-5
    for one in (doubled, model):
        with pytest.raises(RequestError, match="int8"):
            prepare(one, InferenceOptions(int8=True))
    plain = tiny()
    plain.layers[0].feed_forward.w1.__class__ = type("LoRA", (torch.nn.Linear,), {})
    assert not is_packable(plain.layers[0]) and is_packable(plain.layers[1])  # type: ignore[arg-type]
    plain.layers[1].adaLN_modulation.append(torch.nn.Tanh())  # type: ignore[operator]
    assert prepare(plain) is plain


def test_half_precision() -> None:
    """bf16 has 8 bits: the copy rounds where the network does, up to the order of sums."""
    model = tiny(qk_norm=True).to(torch.bfloat16)
    x, t, y = batch(model)
    expected = copy.deepcopy(model)(x.bfloat16(), t, y)
    network = prepared(model)
    network.plan(product(TIMES, LABELS))
    found = network(x.bfloat16(), t, y)
    assert found.dtype == torch.bfloat16 and error(found.float(), expected.float()) <= 2**-6


def test_adaln_weights_on_the_host() -> None:
    """On a CPU nothing moves; tests/gpu/test_sampling_cuda.py looks where they lie."""
    model = tiny()
    x, t, y = batch(model)
    expected = model(x, t, y)
    network = prepared(model, host_modulation=True)
    network.plan(product(TIMES, LABELS))
    assert error(network(x, t, y), expected) <= TOLERANCE
