"""One step, schedules, and what a run's state holds."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from runs import after, flat, started, tiny
from torch import Tensor, nn

from ldit.config.sections import EMAConfig, TrainConfig
from ldit.config.spec import FlowConfig
from ldit.data.batch import Batch
from ldit.training import checkpointing, ema
from ldit.training.ema import Averages
from ldit.training.optim import learning_rate
from ldit.training.saver import Staging
from ldit.training.state import TrainState
from ldit.training.step import train_step
from ldit.training.tasks.diffusion import DiffusionTask

CPU = torch.device("cpu")


def weights(state: TrainState) -> Tensor:
    return flat(state.weights.masters)


@pytest.mark.parametrize("process", ["ddpm", "flow"])
def test_the_loss_falls(process: str) -> None:
    config = tiny(lr=2e-3)
    if process == "flow":
        config = replace(config, process=FlowConfig(), model=replace(config.model, learn_sigma=False))
    _, records = after(config, 25)
    assert records[-1].values["loss"] < 0.8 * records[0].values["loss"]


def test_micro_batches_change_nothing_but_rounding() -> None:
    """Sixteen at once, or in passes of four: the same losses and weights to fp32 rounding of the sums."""
    whole, a = after(tiny(), 3)
    parts, b = after(tiny(micro_batch_size=4), 3)
    for x, y in zip(a, b, strict=True):
        assert x.values["loss"] == pytest.approx(y.values["loss"], rel=1e-5)
        assert x.values["grad_norm"] == pytest.approx(y.values["grad_norm"], rel=1e-4)
    assert (weights(whole) - weights(parts)).abs().max() < 1e-4


def test_bf16_keeps_fp32_master_weights() -> None:
    state, records = after(tiny(precision="bf16"), 3)
    reference, exact = after(tiny(), 3)
    assert all(p.dtype == torch.float32 for p in state.weights.masters)
    for master, compute in zip(state.weights.masters, state.weights.model.parameters(), strict=True):
        assert compute.dtype == torch.bfloat16 and compute.grad is None
        assert torch.equal(master.detach().bfloat16(), compute.detach())
    assert [r.values["loss"] for r in records] == pytest.approx([r.values["loss"] for r in exact], rel=2e-2)
    assert not torch.equal(weights(state), weights(reference))


def test_gradient_clipping_bounds_the_update() -> None:
    """With plain gradients seen through AdamW's first moment: exp_avg = 0.1·gradient, norm 0.1·clip."""
    config = tiny(grad_clip=1e-3)
    state, records = after(config, 1)
    moments = [tensor for name, _, tensor in state.optimizer.state() if name.startswith("exp_avg.")]
    norm = flat(moments).norm().item()
    assert records[0].values["grad_norm"] > 1e-2
    assert norm == pytest.approx(0.1 * 1e-3, rel=1e-3)


class Poisoned(DiffusionTask):
    def losses(self, model: nn.Module, batch: Batch, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        found = super().losses(model, batch, device, dtype)
        return {name: value * (float("nan") if name == "loss" else 1.0) for name, value in found.items()}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_step_that_is_not_finite_is_not_applied(kind: str) -> None:
    """Weights, average, moments and counts stay; the step counts as done, and the state still works."""
    config = tiny()
    config = replace(config, optim=replace(config.optim, kind=kind))
    state, task, loader = started(config)
    batches = list(loader.from_step(0, 3))
    train_step(state, task, batches[0])
    before = [t.clone() for t in (*state.weights.masters, *state.averages.main, *_moments(state))]
    outcome = train_step(state, Poisoned(config, task.spec), batches[1])
    assert outcome.fault == "nonfinite" and state.step == 2 and state.updates == 1
    after = [*state.weights.masters, *state.averages.main, *_moments(state)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not train_step(state, task, batches[2]).fault
    assert state.updates == 2 and state.guard.left_out == 0


def _moments(state: TrainState) -> list[Tensor]:
    return [tensor for _, _, tensor in state.optimizer.state()]


def test_ema_by_hand() -> None:
    """Warm-up min(decay, (1+n)/(10+n)) with n from 0, then the decay."""
    p = torch.tensor([1.0])
    averages = Averages(EMAConfig(0.5, more=(0.9,), power=(0.1,)), [p])
    averages.start([p])
    expected, other = 1.0, 1.0
    for n, value in enumerate([2.0, -1.0, 4.0, 0.5, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0]):
        decay, wide = min(0.5, (1 + n) / (10 + n)), min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * value
        other = wide * other + (1 - wide) * value
        averages.update([torch.tensor([value])], n + 1)
        assert averages.main[0].item() == pytest.approx(expected, rel=1e-6)
        assert averages.tracks["ema-0.9"].values[0].item() == pytest.approx(other, rel=1e-6)
        if n == 0:
            assert averages.tracks["power-0.1000"].values[0].item() == value, "the first update is taken whole"
    assert p.item() == 1.0


def test_ema_without_warm_up_by_hand() -> None:
    """As the original: the decay from the first update, so most of the initial weights stay."""
    averages = Averages(EMAConfig(0.9, more=(0.5,), warmup=False), [torch.tensor([1.0])])
    averages.start([torch.tensor([1.0])])
    for n in range(3):
        averages.update([torch.tensor([0.0])], n + 1)
    assert averages.main[0].item() == pytest.approx(0.9**3, rel=1e-6)
    assert averages.tracks["ema-0.5"].values[0].item() == pytest.approx(0.5**3, rel=1e-6)


def test_averages_at_every_third_update() -> None:
    """One update with the three decays multiplied, also of the warm-up."""
    averages = Averages(EMAConfig(0.5, every=3), [torch.tensor([1.0])])
    averages.start([torch.tensor([1.0])])
    expected = 1.0
    for n, value in enumerate([2.0, -1.0, 4.0, 0.5, 3.0, 7.0, 5.0], start=1):
        averages.update([torch.tensor([value])], n)
        if n % 3 == 0:
            kept = min(0.5, n / (9 + n)) * min(0.5, (n - 1) / (8 + n)) * min(0.5, (n - 2) / (7 + n))
            expected = kept * expected + (1 - kept) * value
        assert averages.main[0].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_averages_on_the_host(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread works piece by piece and leaves the same bits, also where a run is resumed without it."""
    monkeypatch.setattr(ema, "CHUNK", 100)
    config = tiny(precision=precision)
    states = []
    for host in (False, True):
        own = replace(config, ema=EMAConfig(0.9, more=(0.5,), every=2, host=host))
        state, task, loader = started(own)
        for batch in loader.from_step(0, 5):
            train_step(state, task, batch)
        checkpointing.save_work(tmp_path / str(host), state, task.spec, Staging())()
        resumed, _, _ = started(replace(own, ema=replace(own.ema, host=not host)))
        checkpointing.restore(tmp_path / str(host) / "checkpoints" / "step-00000005", resumed)
        for batch in loader.from_step(5, 8):
            train_step(resumed, task, batch)
        states += [state, resumed]
    found = [[flat(track.values) for track in state.averages.tracks.values()] for state in states]
    for a, b in ((0, 2), (1, 3)):
        assert all(torch.equal(x, y) for x, y in zip(found[a], found[b], strict=True))
    assert not torch.equal(found[0][0], found[1][0])


def test_averaging_that_fails_ends_the_run_by_its_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    """No step raises it: other processes would wait. It is kept until all have agreed to end."""
    state, task, loader = started(replace(tiny(), ema=EMAConfig(0.9, host=True)))
    monkeypatch.setattr(ema, "_average", lambda piece, averages: 1 / 0)
    for batch in loader.from_step(0, 3):
        train_step(state, task, batch)
    assert state.averages.failed and state.step == 3
    with pytest.raises(ZeroDivisionError):
        state.averages.wait()
    assert not state.averages.failed


def test_the_norm_of_gradients_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of one micro-batch stay in bf16; their norm is summed in fp32, where bf16 has an error of 2e-3."""
    state, task, loader = started(tiny(precision="bf16"))
    seen: list[Tensor] = []
    gradients = state.weights.gradients

    def look() -> list[Tensor]:
        seen.extend(grad.clone() for grad in gradients())
        return gradients()

    monkeypatch.setattr(state.weights, "gradients", look)
    (batch,) = loader.from_step(0, 1)
    found = train_step(state, task, batch).values["grad_norm"]
    assert {grad.dtype for grad in seen} == {torch.bfloat16}
    assert found == pytest.approx(flat([grad.double() for grad in seen]).norm().item(), rel=1e-5)


def test_the_first_update_of_the_average() -> None:
    """n = 0 at the first step: a tenth of the initial weights stays."""
    state, task, loader = started(tiny())
    before = weights(state).clone()
    (batch,) = loader.from_step(0, 1)
    train_step(state, task, batch)
    expected = 0.1 * before + 0.9 * weights(state)
    off = (flat(state.averages.main) - expected).abs().max()
    assert off <= 2 * torch.finfo(torch.float32).eps * expected.abs().max()


def test_learning_rates() -> None:
    warm = TrainConfig(steps=100, lr=1.0, warmup=10, cooldown=20)
    rates = [learning_rate(warm, step) for step in (1, 10, 11, 80, 81, 100)]
    assert rates == pytest.approx([0.1, 1.0, 1.0, 1.0, 20 / 21, 1 / 21])
    cosine = TrainConfig(steps=100, lr=1.0, schedule="cosine")
    assert learning_rate(cosine, 50) == pytest.approx(0.01 + 0.99 * 0.5)
    assert learning_rate(cosine, 100) == pytest.approx(0.01)
    assert learning_rate(TrainConfig(lr=0.5), 1) == 0.5
    root = TrainConfig(steps=1000, lr=1.0, warmup=100, schedule="inverse-sqrt")
    assert [learning_rate(root, step) for step in (50, 100, 400)] == pytest.approx([0.5, 1.0, 0.5])


@pytest.mark.parametrize("schedule", ["constant", "cosine", "inverse-sqrt"])
def test_a_cooldown_multiplies_any_schedule(schedule: Literal["constant", "cosine", "inverse-sqrt"]) -> None:
    """Linear to zero, which it would reach one step after the last."""
    plain = TrainConfig(steps=100, lr=1.0, warmup=10, schedule=schedule)
    cooled = replace(plain, cooldown=20)
    for step in (1, 10, 11, 80):
        assert learning_rate(cooled, step) == learning_rate(plain, step)
    for step in (81, 90, 100):
        assert learning_rate(cooled, step) == pytest.approx(learning_rate(plain, step) * (101 - step) / 21)


def test_noise_depends_on_the_sample_alone() -> None:
    """The same sample in another batch has the same loss."""
    config = tiny()
    state, task, loader = started(config)
    (batch,) = loader.from_step(0, 1)
    with torch.no_grad():
        for p in state.weights.masters:
            p.add_(0.02)  # a fresh network predicts zero whatever it sees
        whole = task.losses(state.weights.model, batch, CPU, torch.float32)["loss"]
        parts = [task.losses(state.weights.model, micro, CPU, torch.float32)["loss"] for micro in batch.micro(3)]
    assert torch.allclose(whole, torch.cat(parts), rtol=1e-5)
    assert whole.unique().numel() == len(batch)


def test_label_dropout_has_its_rate() -> None:
    config = tiny()
    _, task, _ = started(config)
    n = 2000
    batch = Batch(torch.zeros(n, 3, 1, 1), torch.zeros(n, dtype=torch.long), tuple(range(n)))
    dropped = (task.draw_labels(batch) == config.model.num_classes).float().mean().item()
    assert dropped == pytest.approx(0.1, abs=4 * (0.09 / n) ** 0.5)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_state_survives_bit_for_bit(kind: str, tmp_path: Path) -> None:
    """Saved at step 3 and restored, the next three steps equal those of the undisturbed run."""
    config = tiny()
    config = replace(config, optim=replace(config.optim, kind=kind), ema=EMAConfig(0.99, (0.9,), (0.05,)))
    state, task, loader = started(config)
    batches = list(loader.from_step(0, 6))
    for batch in batches[:3]:
        train_step(state, task, batch)
    work = checkpointing.save_work(tmp_path, state, task.spec, Staging())
    for batch in batches[3:]:
        train_step(state, task, batch)
    work()  # what was copied at step 3 is written now

    resumed, _, _ = started(config)
    folder = tmp_path / "checkpoints" / "step-00000003"
    checkpointing.restore(folder, resumed)
    assert resumed.step == resumed.updates == 3
    for batch in batches[3:]:
        train_step(resumed, task, batch)
    assert torch.equal(weights(state), weights(resumed))
    for name, track in state.averages.tracks.items():
        assert torch.equal(flat(track.values), flat(resumed.averages.tracks[name].values)), name
    assert torch.equal(flat(_moments(state)), flat(_moments(resumed)))
    assert state.guard == resumed.guard and state.scaler == resumed.scaler
    assert json.loads((folder / "config.json").read_text())["training"] == {"step": 3, "images": 48}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_showing_the_average_and_back(precision: str) -> None:
    state, _ = after(tiny(precision=precision), 2)
    masters, average = weights(state).clone(), flat(state.averages.main).clone()
    own = flat(list(state.weights.model.parameters())).clone()
    with state.weights.swapped_in(state.averages.main) as model:
        shown = flat(list(model.parameters()))
        assert torch.equal(shown, average.to(shown.dtype)) and not model.training
    assert torch.equal(weights(state), masters) and torch.equal(flat(state.averages.main), average)
    assert torch.equal(flat(list(state.weights.model.parameters())), own)
