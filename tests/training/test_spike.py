"""N2: a loss spike is left out, and training goes on as if that step had not been. N3: fp16's loss scale recovers."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from counts import count
from faults import Fault, Faulty
from smallrun import begin, numbers, small, tensors, trainer, unequal
from torch import Tensor, nn

from ldit.config.run import RunConfig
from ldit.config.sections import GuardConfig
from ldit.data.batch import Batch
from ldit.errors import RunError
from ldit.training import checkpointing
from ldit.training.guard import SETTLED, WINDOW, Guard, Scaler
from ldit.training.saver import Staging
from ldit.training.state import TrainState
from ldit.training.step import train_step
from ldit.training.tasks.diffusion import DiffusionTask

CASES = range(count(5, 5))


class Spiked(DiffusionTask):
    """A thousand times the target in the samples of one step."""

    def __init__(self, config: RunConfig, spec: Any, step: int) -> None:
        super().__init__(config, spec)
        self.step = step

    def losses(self, model: nn.Module, batch: Batch, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        found = super().losses(model, batch, device, dtype)
        factor = 1e6 if batch.positions[0] // 8 + 1 == self.step else 1.0  # of squared errors
        return {**found, "loss": found["loss"] * factor}


def settled(number: int, policy: str = "skip") -> tuple[RunConfig, int]:
    """A run whose guard can tell a spike, and the step of the spike."""
    kind = ("adamw", "muon")[number % 2]
    step = SETTLED + 2 + number
    values: dict[str, Any] = {"guard.spike_z": 8.0, "guard.spike": policy, "train.seed": number, "optim.kind": kind}
    values |= {"train.steps": step + 2, "train.checkpoint_every": 10}
    return small(values, flow=("v", "x0")[number // 2 % 2]), step


@pytest.mark.parametrize("number", CASES)
def test_n2_a_spike_is_as_if_it_had_not_been(number: int, tmp_path: Path) -> None:
    """Tensors, guard and averages equal those of a run that counted the step and did nothing in it."""
    config, step = settled(number)
    run = trainer(config, tmp_path, partial(Spiked, step=step))
    run.trainer.fit()
    assert [r["step"] for r in run.records if "left_out" in r] == [step]
    record = run.records[step - 1]
    usual = run.records[step - 2]["loss"]
    assert record["left_out"] == "spike" and record["loss"] > 1e4 * usual

    state, task, loader = begin(config)
    for batch in loader.from_step(0, config.train.steps):
        if state.step == step - 1:
            state.step += 1
        else:
            train_step(state, task, batch)
    assert unequal(tensors(state), tensors(run.state)) == []
    assert numbers(state) == numbers(run.state)


def test_n2_without_the_guard_it_is_applied() -> None:
    """What the guard is for: the same spike moves the weights."""
    config, step = settled(0)
    state, task, loader = begin(small(flow="v"))
    outcomes = [train_step(state, Spiked(config, task.spec, step), batch) for batch in loader.from_step(0, step)]
    assert not any(outcome.fault for outcome in outcomes) and state.updates == step


@pytest.mark.parametrize("policy", ["stop", "rollback"])
def test_n2_policies_of_a_spike(policy: str, tmp_path: Path) -> None:
    config, step = settled(1, policy)
    run = trainer(config, tmp_path, partial(Spiked, step=step))
    if policy == "stop":
        with pytest.raises(RunError, match=rf"step {step}: .*guard\.spike"):
            run.trainer.fit()
        return
    run.trainer.fit()
    assert run.state.offset == 8 * (step - 20) and run.state.updates == run.state.step == config.train.steps


@pytest.mark.parametrize("seed", range(10))
def test_n2_no_false_alarm(seed: int) -> None:
    """200 losses of a run that falls and scatters by a tenth: none is above mean + 6 deviations, once settled."""
    random = np.random.RandomState(seed)
    guard, config = Guard(), GuardConfig(spike_z=6.0)
    for n in range(200):
        loss = float((0.2 + math.exp(-n / 40)) * random.normal(1, 0.1))
        assert loss <= guard.limit(config)
        guard.accept(loss)
    assert guard.count == 200 and guard.limit(config) < 2.0
    assert guard.limit(GuardConfig()) == math.inf


def test_the_guards_mean_and_variance() -> None:
    """Plain mean and variance of up to a hundred losses, then each weighs a hundredth; no limit before the 20th."""
    losses = np.random.RandomState(0).uniform(0.5, 1.5, WINDOW)
    guard, config = Guard(left_out=3), GuardConfig(spike_z=2.0)
    for n, loss in enumerate(losses.tolist()):
        assert (guard.limit(config) == math.inf) == (n < SETTLED)
        guard.accept(loss)
        assert guard.left_out == 0
    assert guard.mean == pytest.approx(losses.mean(), rel=1e-12)
    assert guard.variance == pytest.approx(losses.var(), rel=1e-12)
    assert guard.limit(config) == pytest.approx(losses.mean() + 2 * losses.std(), rel=1e-12)
    mean, variance = guard.mean, guard.variance
    guard.accept(3.0)
    assert guard.mean == pytest.approx(0.99 * mean + 0.01 * 3.0, rel=1e-12)
    assert guard.variance == pytest.approx(0.99 * (variance + 0.01 * (3.0 - mean) ** 2), rel=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_n1_nonfinite_is_no_spike(value: float) -> None:
    """A loss that is not finite is dealt with as such, whether or not spikes are looked for."""
    config, _ = settled(0)
    state, task, loader = begin(config)
    state.guard = Guard(mean=1.0, variance=0.01, count=50)
    (batch,) = loader.from_step(0, 1)
    assert train_step(state, Faulty(config, task.spec, Fault("loss", value, 2)), batch).fault == "nonfinite"


# ---------------------------------------------------------------- fp16


def half(number: int) -> RunConfig:
    kind = ("adamw", "muon")[number % 2]
    micro = (4, None)[number // 2 % 2]
    values = {"train.precision": "fp16", "optim.kind": kind, "train.seed": number, "train.micro_batch_size": micro}
    return small(values, flow=("", "v", "x0")[number % 3])


@pytest.mark.parametrize("number", CASES)
def test_n3_an_overflow_halves_the_scale_and_training_recovers(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real overflows from a scale far too large: steps are left out, untouched, until it fits; then it grows again."""
    monkeypatch.setattr(Scaler, "PATIENCE", 3)
    state, task, loader = begin(half(number))
    state.scaler.scale = 2.0**40
    overflows, fresh = 0, tensors(state)
    batches = loader.from_step(0, 60)
    while train_step(state, task, next(batches)).fault == "overflow":
        overflows += 1
        assert state.scaler.scale == 2.0 ** (40 - overflows) and state.scaler.good == 0
        assert state.updates == 0 and state.guard.left_out == 0
        if overflows == 1:
            assert unequal(tensors(state), fresh) == []
    assert overflows >= 1 and state.updates == 1 and state.scaler.good == 1
    assert unequal(tensors(state), fresh) != []
    scale = state.scaler.scale = state.scaler.scale / 16  # the largest that fits one step need not fit the next
    checkpointing.save_work(tmp_path, state, task.spec, Staging())()
    resumed, _, _ = begin(half(number))
    checkpointing.restore(tmp_path / "checkpoints" / f"step-{state.step:08d}", resumed)
    assert resumed.scaler == state.scaler == Scaler(scale, 1)
    following = [next(batches) for _ in range(2)]
    for one in (state, resumed):
        assert [train_step(one, task, batch).fault for batch in following] == ["", ""]
        assert one.scaler == Scaler(2 * scale, 0)
    assert unequal(tensors(state), tensors(resumed)) == [] and numbers(state) == numbers(resumed)


def test_n3_growth_and_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Doubled after PATIENCE good steps in a row, up to 2^24; halved down to 1, where the guard takes over."""
    monkeypatch.setattr(Scaler, "PATIENCE", 3)
    scaler = Scaler.of("fp16")
    assert scaler.scale == 65536.0 and Scaler.of("bf16").scale == Scaler.of("fp32").scale == 1.0
    seen = []
    for fault in (0, 0, 1, 0, 0, 0, 0):
        if fault:
            assert scaler.overflowed()
        else:
            scaler.passed("fp16")
        seen.append((scaler.scale, scaler.good))
    assert seen == [(65536, 1), (65536, 2), (32768, 0), (32768, 1), (32768, 2), (65536, 0), (65536, 1)]
    for _ in range(40 * 3):
        scaler.passed("fp16")
    assert scaler.scale == 2.0**24
    assert [scaler.overflowed() for _ in range(26)] == [True] * 24 + [False] * 2 and scaler.scale == 1.0
    other = Scaler()
    for _ in range(10):
        other.passed("fp32")
    assert other == Scaler()


def test_n3_the_patience_is_2000() -> None:
    scaler = Scaler.of("fp16")
    for _ in range(1999):
        scaler.passed("fp16")
    assert scaler == Scaler(65536.0, 1999)
    scaler.passed("fp16")
    assert scaler == Scaler(131072.0, 0)


@pytest.mark.parametrize(("precision", "scale"), [("fp16", 65536.0), ("fp16", 1.0), ("bf16", 1.0), ("fp32", 1.0)])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_n3_a_loss_that_is_not_finite_is_the_guards(value: float, precision: str, scale: float) -> None:
    """No smaller scale mends a loss, which is never scaled."""
    config = small({"train.precision": precision})
    state, task, loader = begin(config)
    state.scaler.scale = scale
    (batch,) = loader.from_step(0, 1)
    assert train_step(state, Faulty(config, task.spec, Fault("loss", value, 0)), batch).fault == "nonfinite"
    assert state.guard.left_out == 1 and state.scaler.scale == scale


def test_n3_a_gradient_at_scale_1_is_the_guards() -> None:
    """While a larger scale is halved."""
    for scale, fault in ((2.0, "overflow"), (1.0, "nonfinite")):
        config = small({"train.precision": "fp16"})
        state, task, loader = begin(config)
        state.scaler.scale = scale
        (batch,) = loader.from_step(0, 1)
        assert train_step(state, Faulty(config, task.spec, Fault("gradient", math.inf, 0)), batch).fault == fault
        assert state.scaler.scale == 1.0 and state.guard.left_out == int(fault == "nonfinite")


def test_n3_the_scale_changes_rounding_at_most() -> None:
    """Norms and updates are those of the unscaled loss: powers of two change no bit of fp16 that is not subnormal."""
    found = []
    for scale in (2.0**10, 2.0**12):
        state, task, loader = begin(small({"train.precision": "fp16"}, flow="v"))
        state.scaler.scale = scale
        outcomes = [train_step(state, task, batch) for batch in loader.from_step(0, 3)]
        found.append((state, [o.values["grad_norm"] for o in outcomes]))
    (a, norms), (b, others) = found
    assert norms == pytest.approx(others, rel=2e-3)  # 2^-10 for every gradient, some of them subnormal at 2^10
    assert _apart(a, b) < 1e-2


def _apart(a: TrainState, b: TrainState) -> float:
    """Norm of the difference of two states' weights, as a share of a's way from its start at lr 1e-3."""
    off = [(x - y).norm() for x, y in zip(a.weights.masters, b.weights.masters, strict=True)]
    return torch.stack(off).norm().item() / (3 * 1e-3 * sum(x.numel() for x in a.weights.masters) ** 0.5)
