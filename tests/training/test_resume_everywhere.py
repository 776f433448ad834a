"""R1: a run stopped after any step and gone on with is the run that was never stopped, bit for bit."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from smallrun import CLASSES, SIDE, begin, numbers, one_thread, small, tensors, unequal, values_of
from torch import Tensor

from ldit.config.model import OriginalDiTConfig
from ldit.config.run import RunConfig
from ldit.data.batch import Batch
from ldit.training import checkpointing
from ldit.training.guard import Scaler
from ldit.training.saver import Staging
from ldit.training.state import TrainState
from ldit.training.step import train_step

STEPS = 24
SHORT = 2  # steps gone on with after every stop
WHOLE = (1, 5, 13)  # stops after which the run goes on to its end
AVERAGES = {"ema.more": (0.9,), "ema.power": (0.05, 0.1)}

# 20 images in batches of 8: an epoch ends within steps 3, 8, 13, 18, 23, and with steps 5, 10, 15, 20.
SETTINGS: dict[str, RunConfig] = {
    "adamw-accumulating": small({"train.micro_batch_size": 4, "train.warmup": 5, "optim.weight_decay": 0.1}),
    "muon-threads": small({"optim.kind": "muon", "data.workers": 2, "data.flip": True, **AVERAGES}, flow="v"),
    "bf16-cosine": small(
        {
            "train.precision": "bf16",
            "train.schedule": "cosine",
            "train.micro_batch_size": 4,
            "data.workers": 2,
            "optim.kind": "muon",
        },
        flow="x0",
    ),
    "original-dit": small(
        {
            "model": OriginalDiTConfig(SIDE, 4, 3, 16, 1, 2, num_classes=CLASSES, learn_sigma=False),
            "train.precision": "bf16",
            "optim.weight_decay": 0.1,
        },
        flow="v",
    ),
    "fp16-guarded": small({"train.precision": "fp16", "guard.spike_z": 2.0, "data.flip": True, **AVERAGES}),
}


@dataclass
class Recorded:
    """The uninterrupted run: what stood after every step, and what every step reported."""

    tensors: list[dict[str, Tensor]]
    numbers: list[dict[str, Any]]
    reports: list[dict[str, str]]


def batches(loader: Any, state: TrainState, last: int) -> Iterator[Batch]:
    found: Iterator[Batch] = loader.from_step(state.step, last, state.offset)
    return found


def uninterrupted(config: RunConfig, out: Path) -> Recorded:
    """Train to the end, committing every step; one fp16 loss scale is too large, one offset as after a rollback."""
    state, task, loader = begin(config)
    state.scaler.scale *= 2.0**8 if config.train.precision == "fp16" else 1.0
    state.offset = 3 * config.train.batch_size if config.data.flip else 0
    found, staging = Recorded([tensors(state)], [numbers(state)], [{}]), Staging()
    for batch in batches(loader, state, STEPS):
        found.reports.append(values_of(train_step(state, task, batch)))
        found.tensors.append(tensors(state))
        found.numbers.append(numbers(state))
        checkpointing.save_work(out, state, task.spec, staging)()
    return found


@pytest.mark.parametrize("setting", SETTINGS)
def test_r1_every_stop_has_the_same_tail(setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, all averages, moments, guard, scaler, counters, reports; fresh objects read each committed step."""
    monkeypatch.setattr(Scaler, "PATIENCE", 4)
    config = SETTINGS[setting]
    with one_thread():
        whole = uninterrupted(config, tmp_path)
        assert len(whole.reports) == STEPS + 1
        if setting == "fp16-guarded":
            faults = {report["fault"] for report in whole.reports[1:]}
            scales = [n["scaler"]["scale"] for n in whole.numbers]
            assert "overflow" in faults and any(b > a for a, b in pairwise(scales))
        for stop in range(1, STEPS + 1):
            state, task, loader = begin(config)
            checkpointing.restore(tmp_path / "checkpoints" / f"step-{stop:08d}", state)
            assert unequal(tensors(state), whole.tensors[stop]) == [], f"restored from step {stop}"
            assert numbers(state) == whole.numbers[stop]
            for batch in batches(loader, state, STEPS if stop in WHOLE else min(stop + SHORT, STEPS)):
                report = values_of(train_step(state, task, batch))
                assert report == whole.reports[state.step], f"step {state.step} after a stop at {stop}"
                assert numbers(state) == whole.numbers[state.step], f"step {state.step} after a stop at {stop}"
                assert unequal(tensors(state), whole.tensors[state.step]) == [], f"{state.step} after {stop}"
