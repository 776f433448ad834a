"""Muon on one process against torch.optim.Muon, and by hand."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from runs import ALONE, started, tiny
from torch import Tensor, nn

from ldit.config.spec import ModelSpec
from ldit.parallel.exchange import ModelGroup
from ldit.parallel.layout import Layout
from ldit.training.muon import RMS, Muon, MuonSettings, orthogonalised
from ldit.training.optim import _is_matrix
from ldit.training.step import new_state
from ldit.training.tasks.diffusion import DiffusionTask

SHAPES = [(24, 24), (16, 40), (40, 16), (8, 64), (96, 12)]
YES, NO = torch.tensor(True), torch.tensor(False)


def matrices(seed: int = 0) -> list[nn.Parameter]:
    drawn = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=drawn) * 0.1, requires_grad=False) for shape in SHAPES]


def ours(given: list[nn.Parameter], decay: float = 0.0, dtype: torch.dtype = torch.float32) -> Muon:
    settings = MuonSettings(0.95, decay, dtype)
    return Muon(given, [Layout(tuple(m.shape)) for m in given], ModelGroup(), settings)


def gradients(step: int) -> list[Tensor]:
    drawn = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=drawn) for shape in SHAPES]


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_bf16_agrees_with_torchs_own(decay: float) -> None:
    """Square, wide and tall. Both round in bf16 in the same places, and here agree to the bit; products in
    another order may change an entry of the update by a unit of bf16 or two, 2^-7 of the largest."""
    mine, theirs = matrices(), matrices()
    a = ours(mine, decay, torch.bfloat16)
    b = torch.optim.Muon(theirs, lr=0.02, weight_decay=decay, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for step in range(6):
        lr = 0.02 / (step + 1)
        b.param_groups[0]["lr"] = lr
        for t, grad in zip(theirs, gradients(step), strict=True):
            t.grad = grad.clone()
        before = [t.detach().clone() for t in theirs]
        a.step(gradients(step), lr, YES)
        b.step()
        for m, t, old in zip(mine, theirs, before, strict=True):
            largest = (t - old).abs().max().item()
            assert largest > 0.1 * lr
            assert (m - t).abs().max().item() <= 2**-7 * largest


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    """Five iterations bring values from 1 down to 1/100 of the norm between 0.6 and 1.3; directions stay."""
    drawn = torch.Generator().manual_seed(3)
    matrix = torch.randn(shape, generator=drawn)
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    spread = torch.linspace(1.0, 0.1, len(s))
    out = orthogonalised((u * spread) @ vt, torch.float32)
    found = u.T @ out @ vt.T
    assert (found - found.diagonal().diag()).abs().max() < 1e-4
    assert (found.diagonal() > 0.6).all() and (found.diagonal() < 1.3).all()


def test_the_update_by_hand() -> None:
    """Two steps: momentum m <- 0.95 m + 0.05 g, direction g + 0.95·(m - g), rate lr·0.2·sqrt(longer side)."""
    mine = matrices()
    optimizer = ours(mine, 0.1)
    expected = [m.detach().clone() for m in mine]
    moments = [torch.zeros_like(m) for m in mine]
    for step in range(2):
        for i, grad in enumerate(gradients(step)):
            moments[i] = 0.95 * moments[i] + 0.05 * grad
            direction = orthogonalised(0.05 * grad + 0.95 * moments[i], torch.float32)
            rate = 0.01 * RMS * math.sqrt(max(SHAPES[i]))
            expected[i] = expected[i] * (1 - 0.01 * 0.1) - rate * direction
        optimizer.step(gradients(step), 0.01, YES)
    for m, e, buffer, moment in zip(mine, expected, optimizer.buffers, moments, strict=True):
        assert torch.allclose(m, e, rtol=1e-4, atol=1e-6)
        assert torch.allclose(buffer, moment, rtol=1e-5, atol=1e-7)


def test_the_size_of_an_update_is_adamws() -> None:
    """Entries of an orthogonalised r x c matrix have RMS near 1/sqrt(max(r, c)): times the rate, 0.2·lr."""
    mine = matrices()
    optimizer = ours(mine)
    before = [m.detach().clone() for m in mine]
    optimizer.step(gradients(0), 1.0, YES)
    for m, old in zip(mine, before, strict=True):
        rms = (m - old).square().mean().sqrt().item()
        assert 0.6 * RMS < rms < 1.3 * RMS


@pytest.mark.parametrize("value", [math.nan, math.inf, 1.0])
def test_unsound_steps_change_no_bit(value: float) -> None:
    mine = matrices()
    optimizer = ours(mine, 0.1)
    optimizer.step(gradients(0), 0.1, YES)
    before = [t.detach().clone() for t in (*mine, *optimizer.buffers)]
    optimizer.step([torch.full_like(m, value) for m in mine], 0.1, NO)
    assert all(torch.equal(a, b) for a, b in zip(before, (*mine, *optimizer.buffers), strict=True))


def stacked(shapes: list[tuple[int, int]], pieces: list[int], settings: dict[str, Any]) -> tuple[Any, Muon]:
    drawn = torch.Generator().manual_seed(4)
    given = [nn.Parameter(torch.randn(shape, generator=drawn) * 0.1, requires_grad=False) for shape in shapes]
    layouts = [Layout(shape) for shape in shapes]
    return given, Muon(
        given, layouts, ModelGroup(), MuonSettings(pieces=tuple(pieces), dtype=torch.float32, **settings)
    )


def test_pieces_are_orthogonalised_apart() -> None:
    """As if every piece were a parameter of its own; in batches of equal shape, which changes rounding alone."""
    shapes, pieces = [(24, 24), (48, 8), (24, 24), (48, 8), (40, 16)], [1, 6, 1, 6, 1]
    given, chunked = stacked(shapes, pieces, {"weight_decay": 0.1})
    parts = [nn.Parameter(p.detach().clone(), requires_grad=False)
             for m, n in zip(given, pieces, strict=True) for p in m.chunk(n)]  # fmt: skip
    apart = ours(parts, 0.1)
    for step in range(3):
        drawn = torch.Generator().manual_seed(step)
        grads = [torch.randn(m.shape, generator=drawn) for m in given]
        chunked.step(grads, 0.05, YES, step)
        apart.step([p for grad, n in zip(grads, pieces, strict=True) for p in grad.chunk(n)], 0.05, YES)
    found = [p for m, n in zip(given, pieces, strict=True) for p in m.chunk(n)]
    for a, b in zip(found, parts, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-4, atol=1e-6)
    # The whole stack at once would be another direction.
    whole = orthogonalised(torch.cat([torch.eye(8), 3 * torch.eye(8)]), torch.float32)
    assert (whole[:8] - whole[8:]).abs().max() > 0.3


def test_between_the_steps_rows_are_normalised() -> None:
    """With `every` 2, steps 0, 2, … are full; in the others all rows are as long, and the update as large."""
    given, muon = stacked([(12, 32), (32, 12)], [1, 1], {"every": 2, "momentum": 0.0})
    for number in range(4):
        before = [m.detach().clone() for m in given]
        grads = [torch.randn(m.shape, generator=torch.Generator().manual_seed(number)) for m in given]
        muon.step(grads, 1.0, YES, number)
        for m, grad, old in zip(given, grads, before, strict=True):
            update = (old - m.detach()) / (RMS * math.sqrt(32))
            if number % 2 == 0:
                torch.testing.assert_close(update, orthogonalised(grad, torch.float32), rtol=1e-3, atol=1e-5)
            else:
                rows = grad / grad.norm(dim=1, keepdim=True) * math.sqrt(min(m.shape) / m.shape[0])
                torch.testing.assert_close(update, rows, rtol=1e-4, atol=1e-6)
                assert update.norm().item() == pytest.approx(math.sqrt(12), rel=1e-4)


def test_which_parameters_are_muons() -> None:
    """In pieces also the adaLN of blocks, alone or shared; never that of the heads, nor tables."""
    for name in ("layers.0.adaLN_modulation.1.weight", "adaLN_modulation.1.weight"):
        assert _is_matrix(name, chunked=True) and not _is_matrix(name)
    for name in ("final_layer.adaLN_modulation.1.weight", "layers.0.adaLN_modulation.1.bias", "adaLN_table",
                 "mid_head.adaLN_modulation.1.weight", "layers.0.attention.value_mix"):  # fmt: skip
        assert not _is_matrix(name, chunked=True)


def test_rates_by_width() -> None:
    """muP: hidden matrices at base / width of the rate; embedders, biases, norms and labels at the whole."""
    state, _, _ = started(tiny())
    assert {row.share for row in state.optimizer.adamw.rows} == {1.0}
    config = tiny()
    config = replace(config, optim=replace(config.optim, base_width=16))
    state, _, _ = started(config)
    names = {row.name: row.share for row in state.optimizer.adamw.rows}
    hidden = ("layers.0.attention.wq", "layers.1.feed_forward.w2", "layers.0.adaLN_modulation.1",
              "final_layer.linear", "final_layer.adaLN_modulation.1", "t_embedder.mlp.2")  # fmt: skip
    assert {names[f"{name}.weight"] for name in hidden} == {16 / 64}
    whole = ("x_embedder.weight", "t_embedder.mlp.0.weight", "y_embedder.embedding_table.weight",
             "final_layer.linear.bias",
             "layers.0.attention_norm.weight", "layers.0.adaLN_modulation.1.bias")  # fmt: skip
    assert {names[name] for name in whole} == {1.0}
    # At width 2048 the conditioning vector has 1024 values, so that what reads it has as many inputs as at width 1024.
    wide = replace(config.model, dim=2048, n_layers=1, n_heads=2)
    state = new_state(
        replace(config, model=wide, optim=replace(config.optim, base_width=512)),
        DiffusionTask(replace(config, model=wide), ModelSpec(wide, config.process, config.codec)),
        ALONE,
    )
    names = {row.name: row.share for row in state.optimizer.adamw.rows}
    assert names["layers.0.attention.wq.weight"] == names["final_layer.linear.weight"] == 512 / 2048
    for name in ("layers.0.adaLN_modulation.1.weight", "t_embedder.mlp.2.weight"):
        assert names[name] == 512 / 1024


def test_rates_are_shares_of_the_schedules() -> None:
    """The first step of AdamW moves every number by the rate, against the gradient's sign."""
    config = tiny()
    config = replace(config, optim=replace(config.optim, base_width=16))
    state, _, _ = started(config)
    before = [m.detach().clone() for m in state.weights.masters]
    state.optimizer.step([torch.ones_like(m) for m in state.weights.masters], 0.5, YES)
    moved = {round((old - m).mean().item(), 3) for m, old in zip(state.weights.masters, before, strict=True)}
    assert moved == {0.125, 0.5}
