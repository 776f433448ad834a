"""Row D1 of the reliability table, the step's part: an image that could not be read counts for nothing."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from folders import said
from smallrun import ALONE, Images, begin, small, tensors, unequal

from ldit.data.batch import Batch, Fault
from ldit.data.loader import Loader, load_batch
from ldit.errors import DataError, RunError
from ldit.parallel.watchdog import Watchdog
from ldit.training import checkpointing
from ldit.training.skipped import SkippedLog
from ldit.training.step import train_step
from ldit.training.trainer import Trainer

BAD = (3, 7, 11)


class Broken(Images):
    """Three of twenty images cannot be read."""

    def __getitem__(self, index):
        if index in BAD:
            raise DataError(f"cannot read image {self.where(index)}: broken")
        return super().__getitem__(index)


def faulty(batch: Batch, rows: tuple[int, ...]) -> Batch:
    inputs = batch.inputs.clone()
    inputs[list(rows)] = 0
    return replace(batch, inputs=inputs, faults=tuple(Fault(batch.positions[r], f"{r}.png", "broken") for r in rows))


@pytest.mark.parametrize("micro", [8, 4, 2])
@pytest.mark.parametrize("flow", ["", "v"])
def test_the_step_is_that_of_the_readable_ones(micro: int, flow: str) -> None:
    """Gradient: the sum over the readable ones over the nominal batch size. Logged values: their means."""
    config = small({"train.micro_batch_size": micro, "train.grad_clip": 0.0}, flow)
    state, task, loader = begin(config)
    (batch,) = loader.from_step(0, 1)
    rows = (1, 4, 5)
    losses = task.losses(state.weights.model, faulty(batch, rows).readable(), ALONE.device, torch.float32)
    (losses["loss"].sum() / len(batch)).backward()
    expected = torch.cat([p.grad.flatten() for p in state.weights.model.parameters() if p.grad is not None])
    means = {name: value.mean().item() for name, value in losses.items() if name != "time"}
    quarter = (losses["time"] * 4).long().clamp(max=3)
    for q in range(4):
        if (quarter == q).any():
            means[f"loss_q{q + 1}"] = losses["loss"][quarter == q].mean().item()
    state.weights.zero_grad()
    outcome = train_step(state, task, faulty(batch, rows))
    assert outcome.fault == "" and set(means) <= set(outcome.values)
    for name, value in means.items():
        assert outcome.values[name] == pytest.approx(value, rel=1e-5), name
    assert outcome.values["grad_norm"] == pytest.approx(expected.norm().item(), rel=1e-5)
    absent = {f"loss_q{q + 1}" for q in range(4)} - set(means)
    assert not absent & set(outcome.values)


def test_what_a_row_held_does_not_matter() -> None:
    """The row that counts for nothing adds nothing to any gradient: the same bits after the step."""
    found = []
    for value in (0.0, 7.0):
        state, task, loader = begin(small())
        (batch,) = loader.from_step(0, 1)
        broken = faulty(batch, (2,))
        broken.labels[2] = 0
        broken.inputs[2] = value
        outcome = train_step(state, task, broken)
        found.append((outcome.values["loss"], outcome.fault, tensors(state)))
    (loss, fault, one), (other_loss, other_fault, other) = found
    assert loss == other_loss and fault == other_fault == "" and not unequal(one, other)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_batch_without_one_readable_image_is_no_step(optimizer: str) -> None:
    """Nothing moves, weight decay, momentum and averages included, and it counts for no mean of the loss."""
    state, task, loader = begin(small({"optim.kind": optimizer}))
    first, batch, last = loader.from_step(0, 3)
    train_step(state, task, first)
    before, mean = tensors(state), state.guard.mean
    outcome = train_step(state, task, faulty(batch, tuple(range(8))))
    assert outcome.fault == "unreadable" and math.isnan(outcome.values["loss"])
    assert not unequal(before, tensors(state)) and state.guard.mean == mean
    assert (state.step, state.updates, state.guard.left_out) == (2, 1, 1)
    assert train_step(state, task, last).fault == "" and state.guard.left_out == 0


class Gone(Images):
    """Images of which none can be read, or none from the `good`-th reading on."""

    def __init__(self, good: int = 0) -> None:
        super().__init__()
        self.good = good

    def __getitem__(self, index):
        self.good -= 1
        if self.good < 0:
            raise DataError(f"cannot read image {self.where(index)}: broken")
        return super().__getitem__(index)


def trainer(out: Path, config, data, records: list[dict], workers: int = 0) -> Trainer:
    state, task, _ = begin(config)
    train = config.train
    loader = Loader(data, train.batch_size, train.seed, False, workers, bad="skip")
    skip, watchdog = SkippedLog(out / "skipped.jsonl").add, Watchdog(ALONE, 60.0)
    return Trainer(config, task, state, loader.from_step, out, records.append, watchdog=watchdog, skip=skip)


def run(out: Path, config, data) -> list[dict]:
    records: list[dict] = []
    trainer(out, config, data, records).fit()
    return records


def test_a_set_that_cannot_be_read_ends_the_run(tmp_path: Path) -> None:
    """After as many steps as the guard leaves out, with the first reason; what was committed before stands."""
    records: list[dict] = []
    ends = trainer(
        tmp_path, small({"train.steps": 24, "guard.limit": 3, "train.checkpoint_every": 5}), Gone(40), records
    )
    reason = r"cannot read image image \d+: broken$"
    with (
        said() as lines,
        pytest.raises(RunError, match=rf"^step 9: none of its 8 samples .* 4 steps in a row .*{reason}"),
    ):
        ends.fit()
    assert [record.get("left_out") for record in records] == [None] * 5 + ["unreadable"] * 3
    assert [record["loss"] is None for record in records] == [False] * 5 + [True] * 3
    assert "step 6: none of its 8 samples could be read: left out" in lines
    assert [path.name for path in committed(tmp_path)] == ["step-00000005"] and ends.state.updates == 5


def test_a_run_that_read_nothing_does_not_end_as_if_it_had(tmp_path: Path) -> None:
    """Shorter than the guard's patience: no step was applied, nothing is committed."""
    with pytest.raises(
        RunError, match=r"^step 3: none of its 8 samples could be read; no step could be applied; the first"
    ):
        run(tmp_path, small({"train.steps": 3}), Gone())
    assert not committed(tmp_path)


def test_left_out_batches_are_counted_on_after_a_resume(tmp_path: Path) -> None:
    """The same step ends the run, whether it was stopped on the way or not."""
    config = small({"train.steps": 24, "guard.limit": 5, "train.checkpoint_every": 3})
    with pytest.raises(RunError, match=r"^step 8: .* 6 steps in a row"):
        run(tmp_path, config, Gone(16))
    newest = committed(tmp_path)[-1]
    assert newest.name == "step-00000006"
    again = trainer(tmp_path, config, Gone(), [])
    checkpointing.restore(newest, again.state)
    assert (again.state.updates, again.state.guard.left_out) == (2, 4)
    with pytest.raises(RunError, match=r"^step 8: .* 6 steps in a row"):
        again.fit()


def committed(out: Path) -> list[Path]:
    return [path for path in sorted(out.rglob("step-*")) if (path / "manifest.json").is_file()]


def test_every_bad_image_is_recorded_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = small({"train.steps": 6})  # 48 samples of 20 images: each bad one is met twice at least
    run(tmp_path, config, Broken())
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert sorted(line["where"] for line in lines) == sorted(f"image {index}" for index in BAD)
    assert all("broken" in line["reason"] and line["step"] >= 1 for line in lines)
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)


def test_the_record_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "skipped.jsonl"
    path.write_text('{"where": "a", "reason": "x", "step": 1}\n{"where": "b", "rea')  # killed while it wrote
    SkippedLog(path).add([Fault(5, "a", "x"), Fault(6, "b", "y"), Fault(7, "c", "z")], 3)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["where"], line["step"]) for line in lines] == [("a", 1), ("b", 3), ("c", 3)]


def test_held_out_means_leave_bad_images_out() -> None:
    """As if they had not been in the batch: positions, and so noise and times, of the others stay."""
    state, task, _ = begin(small())
    indices = [0, 3, 1, 7, 2]
    batch = load_batch(Broken(), range(5), indices, None, "skip").readable()
    good = load_batch(Images(), [0, 2, 4], [0, 1, 2], None)
    with torch.no_grad():
        a, b = (task.evaluate(state.weights.model, x, ALONE.device, torch.float32) for x in (batch, good))
    assert torch.equal(a["eps_mse"], b["eps_mse"])
