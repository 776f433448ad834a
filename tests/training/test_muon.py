"""Muon on one process against torch.optim.Muon, and by hand."""

import math

import pytest
import torch
from torch import Tensor, nn

from ldit.parallel.exchange import ModelGroup
from ldit.parallel.layout import Layout
from ldit.training.muon import RMS, Muon, orthogonalised

SHAPES = [(24, 24), (16, 40), (40, 16), (8, 64), (96, 12)]
YES, NO = torch.tensor(True), torch.tensor(False)


def matrices(seed: int = 0) -> list[nn.Parameter]:
    drawn = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=drawn) * 0.1, requires_grad=False) for shape in SHAPES]


def ours(given: list[nn.Parameter], decay: float = 0.0, dtype: torch.dtype = torch.float32) -> Muon:
    return Muon(given, [Layout(tuple(m.shape)) for m in given], ModelGroup(), 0.95, decay, dtype)


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
        for m, t, grad in zip(mine, theirs, gradients(step), strict=True):
            m.grad, t.grad = grad.clone(), grad.clone()
        before = [t.detach().clone() for t in theirs]
        a.step(lr, YES)
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
            mine[i].grad = grad.clone()
            moments[i] = 0.95 * moments[i] + 0.05 * grad
            direction = orthogonalised(0.05 * grad + 0.95 * moments[i], torch.float32)
            rate = 0.01 * RMS * math.sqrt(max(SHAPES[i]))
            expected[i] = expected[i] * (1 - 0.01 * 0.1) - rate * direction
        optimizer.step(0.01, YES)
    for m, e, buffer, moment in zip(mine, expected, optimizer.buffers, moments, strict=True):
        assert torch.allclose(m, e, rtol=1e-4, atol=1e-6)
        assert torch.allclose(buffer, moment, rtol=1e-5, atol=1e-7)


def test_the_size_of_an_update_is_adamws() -> None:
    """Entries of an orthogonalised r x c matrix have RMS near 1/sqrt(max(r, c)): times the rate, 0.2·lr."""
    mine = matrices()
    optimizer = ours(mine)
    before = [m.detach().clone() for m in mine]
    for m, grad in zip(mine, gradients(0), strict=True):
        m.grad = grad
    optimizer.step(1.0, YES)
    for m, old in zip(mine, before, strict=True):
        rms = (m - old).square().mean().sqrt().item()
        assert 0.6 * RMS < rms < 1.3 * RMS


@pytest.mark.parametrize("value", [math.nan, math.inf, 1.0])
def test_unsound_steps_change_no_bit(value: float) -> None:
    mine = matrices()
    optimizer = ours(mine, 0.1)
    for m, grad in zip(mine, gradients(0), strict=True):
        m.grad = grad
    optimizer.step(0.1, YES)
    before = [t.detach().clone() for t in (*mine, *optimizer.buffers)]
    for m in mine:
        m.grad = torch.full_like(m, value)
    optimizer.step(0.1, NO)
    assert all(torch.equal(a, b) for a, b in zip(before, (*mine, *optimizer.buffers), strict=True))
