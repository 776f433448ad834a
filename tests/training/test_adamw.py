"""AdamW's moments in fewer bits: rounding, codes, and the update by hand."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import ALONE, started, tiny
from smallrun import tensors, unequal
from torch import Tensor, nn

from ldit.config.sections import OptimConfig
from ldit.parallel.layout import Layout
from ldit.training import checkpointing
from ldit.training import moments as module
from ldit.training.adamw import AdamW, Row
from ldit.training.moments import BLOCK, CODES, PIECE, Moments, _hashed, random_words, seed_of, stochastic_bf16
from ldit.training.saver import Staging
from ldit.training.step import train_step

YES, NO = torch.tensor(True), torch.tensor(False)
SHAPE = (12, 2 * BLOCK)


def test_the_hash_is_that_of_words() -> None:
    """The tensors' wrapping int32 arithmetic gives the 32-bit words of plain Python, and all bits are fair."""
    seed = seed_of(7, 3)
    words = random_words(1 << 16, seed, torch.device("cpu"))
    expected = [_hashed((seed + i) & 0xFFFFFFFF) for i in range(100)]
    assert [word & 0xFFFFFFFF for word in words[:100].tolist()] == expected
    assert len({seed_of(step, index) for step in range(50) for index in range(50)}) == 2500
    for bit in range(32):  # five standard deviations of a fair coin
        assert ((words >> bit) & 1).float().mean().item() == pytest.approx(0.5, abs=5 * 0.5 / 256)


def test_stochastic_rounding_is_right_on_average() -> None:
    """A number a quarter of the way from 1 to its bf16 neighbour 1 + 2^-7 goes up in a quarter of cases, also below 0;
    numbers that bf16 has stay, whatever the bits."""
    bits = torch.arange(1 << 16, dtype=torch.int32)
    for sign in (1.0, -1.0):
        rounded = stochastic_bf16(torch.full((1 << 16,), sign * (1 + 2**-9)), bits).float() * sign
        assert set(rounded.tolist()) == {1.0, 1 + 2**-7}
        assert (rounded > 1).float().mean().item() == 0.25
    exact = torch.randn(1 << 16).to(torch.bfloat16)
    assert torch.equal(stochastic_bf16(exact.float(), bits), exact)


def test_codes_of_eight_bits() -> None:
    """The largest of a block is exact, others are off by less than a code, and by nothing on average."""
    moments = Moments(torch.zeros(SHAPE), Layout(SHAPE), "int8")
    (piece,) = moments.pieces()
    first = torch.randn(24, BLOCK, generator=torch.Generator().manual_seed(0))
    first[7] = 0  # a block without a gradient
    second = torch.rand(24, 1)
    total = torch.zeros_like(first)
    for step in range(400):
        moments.write(piece, first, second, seed_of(step, 0), YES)
        found, squares = moments.read(piece)
        total += found
    assert torch.equal(squares, second)
    largest = first.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(found.abs().amax(-1, keepdim=True), largest, rtol=1e-6, atol=0)
    assert ((found - first).abs() <= largest / CODES * (1 + 1e-5)).all()
    # The mean of 400: five standard deviations of at most half a code.
    assert ((total / 400 - first).abs() <= largest / CODES * 0.5 * 5 / 20 + 1e-9).all()


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_pieces_make_no_difference(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the size of pieces, the same bits."""
    found = []
    for size in (PIECE, 5 * BLOCK):
        monkeypatch.setattr(module, "PIECE", size)
        adamw, p = optimiser(kind, SHAPE)
        for step in range(3):
            adamw.step([drawn(step, SHAPE)], 1e-2, YES, step)
        found.append([p.detach(), *(part for _, _, part in adamw.state())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def optimiser(kind: Any, shape: tuple[int, ...], **more: Any) -> tuple[AdamW, nn.Parameter]:
    p = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)), requires_grad=False)
    config = OptimConfig(moments=kind, **more)
    return AdamW([Row("w", p, Layout(shape), 1.0, Moments(p, Layout(shape), kind))], config, p.device), p


def drawn(step: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 + step)) * 0.01


@pytest.mark.parametrize(
    ("kind", "shape", "off"), [("bf16", (5, 7), 2**-7), ("bf16", (3,), 2**-7), ("int8", (5, 7), 0.0)]
)
def test_few_bits_follow_fp32(kind: str, shape: tuple[int, ...], off: float) -> None:
    """Thirty steps: the sum of updates differs by roundings of the moments, 2^-8 relative each, in random directions.
    int8 leaves parameters that are not made of blocks in fp32, and there is nothing to differ."""
    (few, a), (all_bits, b) = (optimiser(k, shape, weight_decay=0.1) for k in (kind, "fp32"))
    start = a.detach().clone()
    for step in range(30):
        for one in (few, all_bits):
            one.step([drawn(step, shape)], 1e-3, YES, step)
    assert (a - b).norm() <= off * (b - start).norm()
    assert not off or not torch.equal(a, b)


def test_eight_bits_by_hand() -> None:
    """One step from zero: the first moment is the gradient, the second the blocks' mean square."""
    adamw, p = optimiser("int8", SHAPE, weight_decay=0.1)
    before, grad = p.detach().clone(), drawn(0, SHAPE)
    adamw.step([grad], 1e-2, YES, 0)
    size = grad.unflatten(1, (2, BLOCK)).square().mean(-1, keepdim=True).sqrt()
    expected = before * (1 - 1e-2 * 0.1) - 1e-2 * (grad.unflatten(1, (2, BLOCK)) / (size + 1e-8)).flatten(1)
    torch.testing.assert_close(p.detach(), expected, rtol=0, atol=5e-7)  # an eps of 4
    stored = {name: part for name, _, part in adamw.state()}
    assert stored["exp_avg.w"].dtype == torch.int8 and stored["exp_avg_sq.w"].shape == (12, 2)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1.0])
def test_unsound_steps_change_no_bit(kind: str, value: float) -> None:
    adamw, p = optimiser(kind, SHAPE, weight_decay=0.1)
    adamw.step([drawn(0, SHAPE)], 1e-2, YES, 0)
    before = [t.detach().clone() for t in (p, *(part for _, _, part in adamw.state()))]
    adamw.step([torch.full(SHAPE, value)], 1e-2, NO, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, (p, *(part for _, _, part in adamw.state())), strict=True))


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_runs_resume_to_the_bit(kind: Any, tmp_path: Path) -> None:
    config = tiny(precision="bf16")
    wide = replace(config.model, dim=BLOCK, n_heads=4)
    config = replace(config, model=wide, optim=replace(config.optim, moments=kind))
    state, task, loader = started(config, ALONE)
    batches = list(loader.from_step(0, 4))
    for batch in batches[:2]:
        train_step(state, task, batch)
    checkpointing.save_work(tmp_path, state, task.spec, Staging())()
    kinds = {row.moments.kind for row in state.optimizer.adamw.rows}
    assert kinds == {"bf16"} if kind == "bf16" else kinds == {"int8", "fp32"}
    resumed, _, _ = started(config, ALONE)
    checkpointing.restore(tmp_path / "checkpoints" / "step-00000002", resumed)
    for one in (state, resumed):
        for batch in batches[2:]:
            train_step(one, task, batch)
    assert not unequal(tensors(state), tensors(resumed))
