"""What is seen of a run: attention logits, rates, losses by time."""

import contextlib
import math
from typing import Any

import pytest
import torch
from runs import ALONE
from smallrun import begin, changed, small
from torch import Tensor, nn

from ldit.config.model import ClassModelConfig
from ldit.data.batch import Batch
from ldit.nn.build import build_model
from ldit.nn.layers import Attention
from ldit.nn.rope import rotate_real
from ldit.nn.tokens import rope_table
from ldit.training import telemetry as sight
from ldit.training.step import train_step
from ldit.training.telemetry import Clock, largest_logits, peak_flops

CPU = torch.device("cpu")
MODEL = ClassModelConfig(
    dim=32, n_layers=2, n_heads=4, multiple_of=16, input_size=8, patch_size=2, in_channels=3, num_classes=3
)


def network(**changes: Any) -> nn.Module:
    """Every parameter random, so that no layer is silent."""
    from dataclasses import replace

    model = build_model(replace(MODEL, **changes))
    drawn = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=drawn) * 0.3)
    return model


def plain_logits(model: Any, inputs: tuple[Tensor, ...]) -> list[float]:
    """Attention scores of every layer, from the inputs of its attention, head by head in fp64."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].clone())

    handles = [layer.attention.register_forward_pre_hook(keep) for layer in model.layers]
    with torch.no_grad():
        model(*inputs)
    for handle in handles:
        handle.remove()
    found = []
    config = model.config
    table = rope_table(config.rope, 4, 4, config.head_dim, CPU)
    for layer, x in zip(model.layers, seen, strict=True):
        attention, d = layer.attention, config.head_dim
        with torch.no_grad():
            q, k = (
                norm(y.unflatten(-1, (-1, d))) if config.qk_norm == "head" else norm(y).unflatten(-1, (-1, d))
                for y, norm in ((attention.wq(x), attention.q_norm), (attention.wk(x), attention.k_norm))
            )
        q, k = (rotate_real(v.unflatten(-1, (-1, 2)), table.unsqueeze(-3)).double() for v in (q, k))
        group = config.n_heads // config.kv_heads
        largest = 0.0
        for head in range(config.n_heads):
            scores = q[:, :, head] @ k[:, :, head // group].transpose(1, 2) / math.sqrt(d)
            largest = max(largest, scores.abs().max().item())
        found.append(largest)
    return found


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rope", ["raster", "2d"])
@pytest.mark.parametrize("kv_heads", [None, 2])
@pytest.mark.parametrize("qk_norm", [False, True, "head"])
def test_largest_logits_are_those_of_a_plain_computation(
    qk_norm: Any, kv_heads: int | None, rope: str, compiled: bool
) -> None:
    """To fp32 rounding of sums over a head; the network's output is not changed, and no hook is left."""
    model = network(qk_norm=qk_norm, n_kv_heads=kv_heads, rope=rope)
    drawn = torch.Generator().manual_seed(1)
    inputs = (torch.randn(2, 3, 8, 8, generator=drawn), torch.tensor([3.0, 700.0]), torch.tensor([0, 2]))
    expected = plain_logits(model, inputs)
    with torch.no_grad():
        before = model(*inputs)
    if compiled:
        for layer in model.layers:  # type: ignore[union-attr]
            layer.forward = torch.compile(layer.forward, dynamic=False)
    outputs = []
    eager: Any = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
    with eager, torch.no_grad():
        found = largest_logits(model, lambda: outputs.append(model(*inputs)), ALONE)
    assert found == pytest.approx(expected, rel=1e-5) and len(found) == 2
    assert torch.equal(outputs[0], before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_hooks_go_when_the_forward_pass_fails() -> None:
    model = network()

    def fail() -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        largest_logits(model, fail, ALONE)
    assert not any(m._forward_hooks for m in model.modules())
    assert sum(isinstance(m, Attention) for m in model.modules()) == 2


def test_compiled_blocks_run_eagerly_when_looked_into() -> None:
    """Blocks that were compiled and have run: the probe must see inside them, and they go on compiled."""
    model = network(qk_norm=True)
    ran: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            ran.append(1)
            return graph.forward(*args)

        return run

    for layer in model.layers:  # type: ignore[union-attr]
        layer.forward = torch.compile(layer.forward, backend=backend, dynamic=False)
    inputs = (torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0]), torch.tensor([0, 2]))
    with torch.no_grad():
        model(*inputs)
        count = len(ran)
        with torch.compiler.set_stance("force_eager"):
            found = largest_logits(model, lambda: model(*inputs), ALONE)
        assert len(found) == 2 and count >= 2 and len(ran) == count
        model(*inputs)
    assert len(ran) == 2 * count


class Ticks:
    """A clock that goes on when it is told."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> Ticks:
    clock = Ticks()
    monkeypatch.setattr(sight, "time", clock)
    return clock


def test_rates(ticks: Ticks) -> None:
    """Images over time less that of hooks; waiting as a share of it; each line starts anew."""
    clock = Clock(10)

    def batches() -> Any:
        for _ in range(3):
            ticks.now += 0.5
            yield Batch(torch.zeros(0), torch.zeros(0), ())

    for _ in clock.timed(batches()):
        ticks.now += 1.5  # the step
    with clock.apart():
        ticks.now += 100.0
    assert clock.rates(13, 8, 2.0, 16.0) == {"images_per_second": 4.0, "data_wait": 0.25, "mfu": 0.5}
    ticks.now += 2.0
    assert clock.rates(14, 8, 2.0, None) == {"images_per_second": 4.0, "data_wait": 0.0}
    assert clock.rates(14, 8, 2.0, None)["images_per_second"] == 0.0  # no time, no division by zero


def test_peaks_are_known_of_gpus_alone() -> None:
    assert peak_flops(ALONE, "bf16") is None
    assert sight.peak_memory(ALONE.device) > 1 << 20


@pytest.mark.parametrize("flow", ["", "v"])
@pytest.mark.parametrize("micro", [None, 4])
def test_losses_by_quarter_make_the_loss(flow: str, micro: int | None) -> None:
    """Weighted with the samples in each quarter, counted here from the times themselves; empty quarters are absent."""
    state, task, loader = begin(small({"train.micro_batch_size": micro}, flow=flow))
    for batch in loader.from_step(0, 4):
        times = task.draw_times(batch).double()
        share = (times + 1) / 1000 if not flow else times
        quarters = [min(int(t * 4), 3) for t in share.tolist()]
        values = train_step(state, task, batch).values
        counts = [quarters.count(q) for q in range(4)]
        assert {q for q in range(4) if f"loss_q{q + 1}" in values} == {q for q in range(4) if counts[q]}
        total = sum(values[f"loss_q{q + 1}"] * n for q, n in enumerate(counts) if n)
        assert total / 8 == pytest.approx(values["loss"], rel=1e-12)  # sums in fp64


def test_low_precision_micro_batches_equal_their_sum() -> None:
    """bf16 gradients of 8 passes are added in fp32: apart from one pass over all by bf16's rounding of each only."""
    norms, losses = [], []
    for micro in (None, 1):
        state, task, loader = begin(small({"train.precision": "bf16", "train.micro_batch_size": micro}, flow="v"))
        (batch,) = loader.from_step(0, 1)
        outcome = train_step(state, task, batch)
        norms.append(outcome.values["grad_norm"])
        losses.append(outcome.values["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=2**-8)
    assert norms[0] == pytest.approx(norms[1], rel=2**-6)


@pytest.mark.parametrize("clip", [0.0, 0.05, 1e3])
def test_clipping_shrinks_to_the_norm(clip: float) -> None:
    """The gradient the optimiser sees, from AdamW's first moment: min(norm, clip), or as it is."""
    state, task, loader = begin(changed(small(), {"train.grad_clip": clip}))
    (batch,) = loader.from_step(0, 1)
    norm = train_step(state, task, batch).values["grad_norm"]
    moments = [value for name, _, value in state.optimizer.state() if name.startswith("exp_avg.")]
    seen = torch.cat([m.flatten() for m in moments]).norm().item() / (1 - state.config.optim.beta1)
    assert norm > 0.05 and seen == pytest.approx(min(norm, clip) if clip else norm, rel=1e-4)
