"""Any size: scaled positions in closed form, and networks at sizes other than the one they were trained at."""

import math
from dataclasses import replace
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import Tensor

from ldit.config.model import ClassModelConfig, OriginalDiTConfig, TextModelConfig
from ldit.config.presets import preset
from ldit.nn.build import build_model
from ldit.nn.conditioning import TextCondition
from ldit.nn.dit import DiT, init_weights
from ldit.nn.dit_original import position_table
from ldit.nn.rope import GridScale, grid_table, raster_table, rotate, scaled_raster_table
from ldit.nn.tokens import rope_table
from ldit.rng import generator

TINY: dict[str, Any] = {"dim": 32, "n_layers": 2, "n_heads": 4, "multiple_of": 16, "input_size": 8, "num_classes": 5}
CPU = torch.device("cpu")
EPS = torch.finfo(torch.float32).eps


def network(config: Any) -> Any:
    """Random weights everywhere, also where a fresh model has zeros."""
    torch.manual_seed(0)
    model: Any = build_model(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name != "pos_embed":
                p.copy_(torch.randn_like(p) * 0.3 + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return model.eval().requires_grad_(False)


def turns(table: Tensor) -> Tensor:
    """The table as complex numbers (T, d/2)."""
    return torch.view_as_complex(table)


def close(a: Tensor, b: Tensor, largest: float) -> None:
    """Cosines and sines of angles up to `largest`, which fp32 rounds a few times on the way."""
    assert (a - b).abs().max() <= 4 * EPS * max(1.0, largest)


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (8, 24), (32, 16), (1, 5)])
def test_positions_as_trained_are_the_published_ones(rows: int, columns: int) -> None:
    assert torch.equal(rope_table("2d", rows, columns, 8, CPU, GridScale()), grid_table(rows, columns, 8))
    published = raster_table(rows * columns, 8)
    assert torch.equal(rope_table("raster", rows, columns, 8, CPU), published)
    close(rope_table("raster", rows, columns, 8, CPU, GridScale()), published, rows * columns)


def test_interpolation_contains_the_trained_positions() -> None:
    """At twice the size and factor 2 every second row and column is where training had one."""
    trained = grid_table(4, 6, 16).unflatten(0, (4, 6))
    scaled = rope_table("2d", 8, 12, 16, CPU, GridScale(rows=2, columns=2)).unflatten(0, (8, 12))
    assert torch.equal(scaled[::2, ::2], trained)
    assert not torch.equal(scaled[1, 0], trained[0, 0]) and not torch.equal(scaled[1, 0], trained[1, 0])
    trained = raster_table(4 * 6, 16).unflatten(0, (4, 6))
    scaled = rope_table("raster", 4, 12, 16, CPU, GridScale(columns=2, stride=6)).unflatten(0, (4, 12))
    close(scaled[:, ::2], trained, 24)


@pytest.mark.parametrize("factor", [1.5, 3.0])
def test_interpolation_divides_positions(factor: float) -> None:
    """By the axis it is for; against angles in float64."""
    frequency = 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    rows, columns = torch.arange(5.0, dtype=torch.float64), torch.arange(7.0, dtype=torch.float64)
    scaled = turns(rope_table("2d", 5, 7, 16, CPU, GridScale(rows=factor))).unflatten(0, (5, 7))
    for r in range(5):
        for c in range(7):
            angle = torch.cat([rows[r] / factor * frequency, columns[c] * frequency])
            assert (scaled[r, c] - torch.polar(torch.ones_like(angle), angle)).abs().max() <= 8 * 4 * EPS


@pytest.mark.parametrize("kind", ["2d", "raster"])
def test_ntk_keeps_the_highest_frequency_and_divides_the_lowest(kind: str) -> None:
    """In between the frequencies are those of theta·s^(n/(n-1)), as NTK-aware scaling writes it."""
    stretch, count = 3.0, 4 if kind == "2d" else 8
    theta = 10000.0 * stretch ** (count / (count - 1))
    expected = theta ** (-torch.arange(count, dtype=torch.float64) / count)
    plain = turns(rope_table(kind, 2, 1, 16, CPU))
    scaled = turns(rope_table(kind, 2, 1, 16, CPU, GridScale(ntk_rows=stretch)))
    row = scaled[1, :count].angle()
    assert scaled[1, 0] == plain[1, 0]
    assert row[-1].item() == pytest.approx(10000.0 ** -((count - 1) / count) / stretch, rel=4 * EPS)
    assert (row / expected - 1).abs().max() <= 8 * EPS
    column = turns(rope_table(kind, 1, 2, 16, CPU, GridScale(ntk_columns=stretch)))[1, -count:].angle()
    assert torch.equal(column, row)


def test_a_lone_frequency_is_the_highest() -> None:
    assert torch.equal(rope_table("2d", 3, 3, 4, CPU, GridScale(ntk_rows=2.0)), grid_table(3, 3, 4))


def test_rows_of_a_raster_lie_a_trained_stride_apart() -> None:
    """Eight trained columns: in an image of twelve the next row is again eight positions further, and a column that
    is interpolated stays short of it."""
    table = scaled_raster_table(6, 12, 16, GridScale(columns=1.5, stride=8)).unflatten(0, (6, 12))
    trained = raster_table(6 * 8, 16)
    close(table[:, 0], trained[::8], 48)
    close(table[:, 3], trained[2::8], 48)
    highest = turns(table)[0, :, -1].angle()
    assert highest.max() < 8 * 10000 ** (-14 / 16)


# --- attention --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [False, True])
def test_the_factor_on_logits(compiled: bool) -> None:
    """Pairs of length sqrt(f) give what attention at scale f/sqrt(d) does, in a compiled block too, and with grouped
    heads."""
    model = network(ClassModelConfig(**TINY, n_kv_heads=2, qk_norm=True))
    attention, factor = model.layers[0].attention, 1.7
    x = torch.randn(2, 24, 32)
    plain = rope_table("2d", 4, 6, 8, CPU)
    scaled = rope_table("2d", 4, 6, 8, CPU, GridScale(softmax=factor))
    q = rotate(attention._heads(attention.wq(x), 4, attention.q_norm), plain).transpose(1, 2)
    k = rotate(attention._heads(attention.wk(x), 2, attention.k_norm), plain).transpose(1, 2)
    v = attention.wv(x).unflatten(-1, (2, 8)).transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v, scale=factor / math.sqrt(8), enable_gqa=True)
    expected = attention.wo(out.transpose(1, 2).flatten(2))
    run = torch.compile(attention, backend="aot_eager") if compiled else attention
    assert (run(x, scaled) - expected).abs().max() <= 32 * EPS * expected.abs().max()
    assert (run(x, plain) - expected).abs().max() > 1e-3 * expected.abs().max()


def test_the_factor_on_logits_of_the_baseline() -> None:
    model = network(OriginalDiTConfig(input_size=8, hidden_size=32, depth=1, num_heads=4, num_classes=5))
    attention, x = model.blocks[0].attn, torch.randn(2, 24, 32)
    q, k, v = attention.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
    expected = attention.proj(((q @ k.mT) * (1.7 / math.sqrt(8))).softmax(-1).matmul(v).transpose(1, 2).flatten(2))
    assert (attention(x, 1.7) - expected).abs().max() <= 32 * EPS * expected.abs().max()


# --- networks ---------------------------------------------------------------------------------------------------------

KINDS: dict[str, Any] = {
    "raster": ClassModelConfig(**TINY, rope="raster"),
    "2d": ClassModelConfig(**TINY, rope="2d"),
    "dit": OriginalDiTConfig(input_size=8, hidden_size=32, depth=2, num_heads=4, num_classes=5),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_takes_scaled_positions(kind: str) -> None:
    """No scale, or one that changes nothing, is as before; every field changes the output."""
    model = network(KINDS[kind])
    x, t, y = torch.randn(2, 4, 8, 12), torch.tensor([5.0, 5.0]), torch.tensor([0, 4])
    before = model(x, t, y)
    assert torch.equal(model(x, t, y, grid=None), before)
    same = model(x, t, y, grid=GridScale())
    if kind == "raster":  # the row and the column turn one after the other
        assert (same - before).abs().max() <= 64 * EPS * before.abs().max()
    else:
        assert torch.equal(same, before)
    fields = {"rows": 2.0, "columns": 2.0, "ntk_rows": 2.0, "ntk_columns": 2.0, "softmax": 1.2}
    for name, value in ({**fields, "stride": 4} if kind == "raster" else fields).items():
        changed = model(x, t, y, grid=replace(GridScale(), **{name: value}))
        assert changed.shape == before.shape and (changed - same).abs().max() > 1e-3 * before.abs().max(), name


def test_the_baseline_at_other_sizes() -> None:
    """Its table is a formula: at twice the size, interpolated, it holds the trained one."""
    model = network(KINDS["dit"])
    trained = model.pos_embed.unflatten(1, (4, 4))
    assert torch.equal(position_table(8, 6, 32).unflatten(1, (8, 6))[:, :4, :4], trained)
    scaled = position_table(8, 8, 32, GridScale(rows=2, columns=2)).unflatten(1, (8, 8))
    assert torch.equal(scaled[:, ::2, ::2], trained)
    high, low = position_table(2, 1, 32, GridScale(ntk_rows=3))[0, 1, 16:24].asin()[[0, -1]]
    assert high == torch.tensor(1.0).sin().asin() and low == pytest.approx(10000 ** (-7 / 8) / 3, rel=4 * EPS)
    with pytest.raises(ValueError, match="8x7 is not divisible by the patch size 2"):
        model(torch.randn(1, 4, 8, 7), torch.zeros(1), torch.zeros(1, dtype=torch.long))


@pytest.mark.parametrize("rope", ["raster", "2d"])
def test_more_tokens_than_the_originals_table(rope: str) -> None:
    """The published code makes a table of 4096 positions; here 65 x 65 tokens are as right as few."""
    config = ClassModelConfig(**{**TINY, "dim": 8, "n_heads": 1, "n_layers": 1, "patch_size": 2}, rope=rope)  # type: ignore[arg-type]
    model = network(config)
    x = torch.randn(1, 4, 130, 130)
    out = model(x, torch.tensor([3.0]), torch.tensor([1]))[0]
    expected = reference.forward(config, model.state_dict(), x[0], 3.0, y=1)
    # The angle of position 4224 is off by half a unit of its last place, 2^-12, the mean over 4225 tokens by less.
    assert (out - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize("rope", ["raster", "2d"])
def test_a_text_model_takes_scaled_positions(rope: str) -> None:
    """Rows end with a token of their own, which counts as a column; padding continues below the image."""
    sizes: dict[str, Any] = {"dim": 32, "n_layers": 1, "n_heads": 4, "multiple_of": 16, "max_seq_len": 24}
    model = network(TextModelConfig(**sizes, cap_feat_dim=12, rope=rope, rope_scaling_factor=1.5))  # type: ignore[arg-type]
    condition = TextCondition(torch.randn(1, 2, 12), torch.ones(1, 2, dtype=torch.bool))
    x, t = torch.randn(1, 4, 12, 16), torch.tensor([5.0])  # 6 rows of 9 tokens: more than in training
    before = model(x, t, condition)
    same = model(x, t, condition, grid=GridScale())
    assert before.shape == (1, 8, 12, 16) and (same - before).abs().max() <= 64 * EPS * before.abs().max()
    fields: dict[str, Any] = {"rows": 2.0, "columns": 2.0, "ntk_rows": 2.0, "ntk_columns": 2.0}
    for name, value in ({**fields, "stride": 5} if rope == "raster" else fields).items():
        changed = model(x, t, condition, grid=replace(GridScale(), **{name: value}))
        assert (changed - same).abs().max() > 1e-4 * before.abs().max(), name
    # The angles, worked out by hand: interpolated by 2 along rows, and by the model's own 1.5.
    table = model.positions(x, GridScale(rows=2.0, stride=7 if rope == "raster" else None))
    assert table.shape == (54, 4, 2)
    row, column = 5, 3
    angles = [math.atan2(*table[row * 9 + column, i].flip(0).tolist()) for i in range(4)]
    if rope == "raster":
        expected = [(row * 7 / 3.0 + column / 1.5) * 10000 ** (-i / 4) for i in range(4)]
    else:
        expected = [row / 3.0 * 10000 ** (-i / 2) for i in range(2)] + [
            column / 1.5 * 10000 ** (-i / 2) for i in range(2)
        ]
    for angle, own in zip(angles, expected, strict=True):
        assert math.sin(angle - own) == pytest.approx(0, abs=1e-5) and math.cos(angle - own) > 0


# --- the published widths ---------------------------------------------------------------------------------------------


def wide(n_layers: int, **changes: Any) -> DiT:
    torch.manual_seed(0)
    model = build_model(preset("DiT_Llama_600M_patch2", qk_norm=True, n_layers=n_layers, **changes))
    assert isinstance(model, DiT)
    init_weights(model, lambda name: generator(0, name))
    with torch.no_grad():
        for name, p in model.named_parameters():  # a fresh network's output is zero
            if "adaLN_modulation" in name or name.startswith("final_layer.linear"):
                p.normal_(0, 0.02)
    return model.eval().requires_grad_(False)


def runs_at(model: DiT, height: int, width: int) -> None:
    x, t, y = torch.randn(1, 4, height, width), torch.tensor([500.0]), torch.tensor([207])
    side = 16
    scales = (None, GridScale(rows=max(1, height / 2 / side), columns=max(1, width / 2 / side), softmax=1.02))
    outs = [model(x, t, y, grid=grid) for grid in scales]
    for out in outs:
        assert out.shape == (1, 8, height, width) and out.isfinite().all() and out.std() > 1e-3
    assert not torch.equal(*outs)


@pytest.mark.parametrize("size", [(16, 48), (64, 32)], ids=str)
@pytest.mark.parametrize("rope", ["raster", "2d"])
def test_widths_of_600m_at_other_sizes(rope: str, size: tuple[int, int]) -> None:
    """One block of the published width; all sixteen are the slow test's."""
    runs_at(wide(1, rope=rope), *size)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_600m_at_other_sizes() -> None:
    model = wide(16)
    for size in ((16, 48), (64, 32)):
        runs_at(model, *size)
