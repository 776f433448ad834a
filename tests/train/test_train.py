"""One step, the average of the weights, schedules, and what a run's state holds."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldit.config.recipes import recipe
from ldit.config.run import RunConfig
from ldit.config.sections import TrainConfig
from ldit.config.spec import ClassConditionerConfig, FlowConfig, ModelSpec
from ldit.data.batch import Batch
from ldit.data.loader import Loader
from ldit.data.source import open_data
from ldit.train import state_io
from ldit.train.ema import EMA
from ldit.train.optim import learning_rate
from ldit.train.step import TrainState, train_step
from ldit.train.task import DiffusionTask


def tiny(**train: Any) -> RunConfig:
    config = recipe("tiny-cpu")
    return replace(config, train=replace(config.train, **train))


def started(config: RunConfig) -> tuple[TrainState, DiffusionTask, Loader]:
    data, _ = open_data(config.data.path, config.data.image_size, config.data.heldout, config.data.max_per_class)
    spec = ModelSpec(config.model, config.process, config.codec, ClassConditionerConfig(data.names))
    task = DiffusionTask(config, spec)
    return TrainState(task.build(), config), task, Loader(data, config.train.batch_size, config.train.seed, False)


def after(config: RunConfig, steps: int) -> tuple[TrainState, list[dict[str, float]]]:
    state, task, loader = started(config)
    return state, [train_step(state, task, batch) for batch in loader.from_step(0, steps)]


def weights(state: TrainState) -> Tensor:
    return torch.cat([p.detach().flatten() for p in state.parameters])


@pytest.mark.parametrize("process", ["ddpm", "flow"])
def test_the_loss_falls(process: str) -> None:
    config = tiny(lr=2e-3)
    if process == "flow":
        config = replace(config, process=FlowConfig(), model=replace(config.model, learn_sigma=False))
    _, records = after(config, 25)
    assert records[-1]["loss"] < 0.8 * records[0]["loss"]


def test_micro_batches_change_nothing_but_rounding() -> None:
    """Sixteen at once, or in passes of four: the same losses and weights to fp32 rounding of the sums."""
    whole, a = after(tiny(), 3)
    parts, b = after(tiny(micro_batch_size=4), 3)
    for x, y in zip(a, b, strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-5)
        assert x["grad_norm"] == pytest.approx(y["grad_norm"], rel=1e-4)
    assert (weights(whole) - weights(parts)).abs().max() < 1e-4


def test_bf16_keeps_fp32_master_weights() -> None:
    state, records = after(tiny(precision="bf16"), 3)
    reference, exact = after(tiny(), 3)
    assert all(p.dtype == torch.float32 for p in state.parameters)
    assert next(state.compute.parameters()).dtype == torch.bfloat16
    for master, compute in zip(state.parameters, state.compute.parameters(), strict=True):
        assert torch.equal(master.detach().bfloat16(), compute.detach())
    assert [r["loss"] for r in records] == pytest.approx([r["loss"] for r in exact], rel=2e-2)
    assert not torch.equal(weights(state), weights(reference))


def test_gradient_clipping_bounds_the_update() -> None:
    """With plain gradients seen through AdamW's first moment: exp_avg = 0.1·gradient, norm 0.1·clip."""
    config = tiny(grad_clip=1e-3)
    state, records = after(config, 1)
    moments = [state.optimizer.state[p]["exp_avg"] for p in state.parameters]
    norm = torch.cat([m.flatten() for m in moments]).norm().item()
    assert records[0]["grad_norm"] > 1e-2
    assert norm == pytest.approx(0.1 * 1e-3, rel=1e-3)


class Poisoned(DiffusionTask):
    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {name: value * float("nan") for name, value in super().losses(model, batch).items()}


def test_a_gradient_that_is_not_finite_is_not_applied() -> None:
    config = tiny()
    state, task, loader = started(config)
    (batch,) = loader.from_step(0, 1)
    before, average = weights(state).clone(), [a.clone() for a in state.ema.average]
    with pytest.raises(FloatingPointError, match="step 1"):
        train_step(state, Poisoned(config, task.spec), batch)
    assert torch.equal(weights(state), before) and state.step == 0
    assert all(torch.equal(a, b) for a, b in zip(average, state.ema.average, strict=True))
    train_step(state, task, batch)  # and the state still works
    assert state.step == 1


def test_ema_by_hand() -> None:
    """Warm-up min(decay, (1+n)/(10+n)), then the decay."""
    p = torch.tensor([1.0])
    ema = EMA([p], 0.5)
    expected = 1.0
    for n, value in enumerate([2.0, -1.0, 4.0, 0.5, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0]):
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * value
        ema.update([torch.tensor([value])], n)
        assert ema.average[0].item() == pytest.approx(expected, rel=1e-6)
    assert p.item() == 1.0


def test_the_first_update_of_the_average() -> None:
    """n = 0 at the first step: a tenth of the initial weights stays."""
    state, task, loader = started(tiny())
    before = weights(state).clone()
    (batch,) = loader.from_step(0, 1)
    train_step(state, task, batch)
    average = torch.cat([a.flatten() for a in state.ema.average])
    expected = 0.1 * before + 0.9 * weights(state)
    assert (average - expected).abs().max() <= 2 * torch.finfo(torch.float32).eps * expected.abs().max()


def test_learning_rates() -> None:
    warm = TrainConfig(steps=100, lr=1.0, warmup=10, cooldown=20)
    rates = [learning_rate(warm, step) for step in (1, 10, 11, 80, 81, 100)]
    assert rates == pytest.approx([0.1, 1.0, 1.0, 1.0, 20 / 21, 1 / 21])
    cosine = TrainConfig(steps=100, lr=1.0, schedule="cosine")
    assert learning_rate(cosine, 50) == pytest.approx(0.01 + 0.99 * 0.5)
    assert learning_rate(cosine, 100) == pytest.approx(0.01)
    assert learning_rate(TrainConfig(lr=0.5), 1) == 0.5


def test_noise_depends_on_the_sample_alone() -> None:
    """The same sample in another batch has the same loss."""
    config = tiny()
    state, task, loader = started(config)
    (batch,) = loader.from_step(0, 1)
    with torch.no_grad():
        for p in state.parameters:
            p.add_(0.02)  # a fresh network predicts zero whatever it sees
        whole = task.losses(state.compute, batch)["loss"]
        parts = torch.cat([task.losses(state.compute, micro)["loss"] for micro in batch.micro(3)])
    assert torch.allclose(whole, parts, rtol=1e-5)
    assert whole.unique().numel() == len(batch)


def test_label_dropout_has_its_rate() -> None:
    config = tiny()
    _, task, _ = started(config)
    n = 2000
    batch = Batch(torch.zeros(n, 3, 1, 1), torch.zeros(n, dtype=torch.long), tuple(range(n)))
    dropped = (task._drop(batch) == config.model.num_classes).float().mean().item()
    assert dropped == pytest.approx(0.1, abs=4 * (0.09 / n) ** 0.5)


def test_state_survives_bit_for_bit(tmp_path: Path) -> None:
    """Saved at step 3 and restored, the next three steps equal those of the undisturbed run."""
    config = tiny()
    state, task, loader = started(config)
    batches = list(loader.from_step(0, 6))
    for batch in batches[:3]:
        train_step(state, task, batch)
    folder = state_io.save(tmp_path, state, task.spec, keep=2)
    for batch in batches[3:]:
        train_step(state, task, batch)

    resumed, _, _ = started(config)
    state_io.restore(folder, resumed)
    assert resumed.step == 3
    for batch in batches[3:]:
        train_step(resumed, task, batch)
    assert torch.equal(weights(state), weights(resumed))
    assert all(torch.equal(a, b) for a, b in zip(state.ema.average, resumed.ema.average, strict=True))
    for a, b in zip(state.parameters, resumed.parameters, strict=True):
        left, right = state.optimizer.state[a], resumed.optimizer.state[b]
        assert left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)
    assert json.loads((folder / "config.json").read_text())["training"] == {"step": 3, "images": 48}


def test_ema_model_holds_the_average() -> None:
    state, _ = after(tiny(), 2)
    before = copy.deepcopy(state.master.state_dict())
    model = state.ema_model()
    averaged = dict(state.ema_tensors())
    assert all(torch.equal(value, averaged[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in state.master.state_dict().items())
    assert not torch.equal(averaged["x_embedder.weight"], before["x_embedder.weight"])
