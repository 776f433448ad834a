"""The loop around the steps: when things are due, what is logged, what a failed run leaves."""

import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from faults import Fault, Faulty
from smallrun import Run, small, trainer

from ldit.errors import RunError
from ldit.storage.signals import Stopped
from ldit.training import checkpointing
from ldit.training.state import TrainState
from ldit.training.trainer import Hook


def failing(changes: dict[str, Any], out: Path, *steps: int) -> Run:
    """A run in which these steps, counted in batches of the stream, bring a NaN."""
    faults = [Fault("loss", math.nan, (step - 1) * 8) for step in steps]
    return trainer(small(changes), out, lambda config, spec: Faulty(config, spec, *faults))


def test_what_is_due(tmp_path: Path) -> None:
    """Log lines at the first, every n-th and last step and where a hook ran; commits and hooks every n-th and last."""
    called: list[int] = []

    def hook(state: TrainState) -> dict[str, Any]:
        called.append(state.step)
        return {"measured": float(state.step)}

    values = {"train.steps": 11, "train.log_every": 5, "train.checkpoint_every": 4}
    run = trainer(small(values), tmp_path, hooks=[Hook(3, hook), Hook(0, lambda state: called.append(-1))])
    run.trainer.fit()
    assert called == [3, 6, 9, 11]
    assert [r["step"] for r in run.records] == [1, 3, 5, 6, 9, 10, 11]
    assert [r["step"] for r in run.records if "measured" in r] == called
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == [f"step-{step:08d}" for step in (4, 8, 11)]
    assert {"loss", "grad_norm", "lr", "images_per_second", "data_wait", "memory"} <= run.records[0].keys()


def test_what_takes_long_comes_after_the_save(tmp_path: Path) -> None:
    """The step and its record are there when a grid is drawn; a run that is to stop saves and draws nothing."""
    seen: list[tuple[int, bool, int]] = []
    shown: list[int] = []

    def draw(state: TrainState) -> None:
        is_saved = (tmp_path / "checkpoints" / f"step-{state.step:08d}").is_dir()
        seen.append((state.step, is_saved, run.records[-1]["step"]))
        if state.step == 4:
            os.kill(os.getpid(), signal.SIGUSR1)

    values = {"train.steps": 9, "train.log_every": 0, "train.checkpoint_every": 2}
    run = trainer(small(values), tmp_path, hooks=[Hook(2, draw, after_save=True), Hook(5, draw, after_save=True)])
    run.trainer.show = shown.append
    with pytest.raises(Stopped):
        run.trainer.fit()
    assert seen == [(2, True, 2), (4, True, 4)] and shown == [2, 4]
    assert run.trainer.received == [signal.SIGUSR1]
    assert (tmp_path / "checkpoints" / "step-00000005").is_dir()


def test_a_step_left_out_is_logged_whenever_it_comes(tmp_path: Path) -> None:
    run = failing({"train.steps": 6, "train.log_every": 0}, tmp_path, 4)
    run.trainer.fit()
    assert [(r["step"], r["left_out"], r["loss"]) for r in run.records] == [(4, "nonfinite", None)]


def test_rates_after_a_rollback(tmp_path: Path) -> None:
    """No negative number of images a second."""
    values = {"train.steps": 8, "train.checkpoint_every": 3, "guard.nonfinite": "rollback"}
    run = failing(values, tmp_path, 6)
    run.trainer.fit()
    assert all(r["images_per_second"] > 0 for r in run.records)


def test_a_run_that_ends_keeps_the_save_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard stops the run right after a commit began: it is there when `fit` has raised, for the process ends then
    and its threads with it."""
    real = checkpointing.write_step

    def slow(*given: Any) -> Path:
        time.sleep(0.3)
        return real(*given)

    monkeypatch.setattr(checkpointing, "write_step", slow)
    values = {"train.checkpoint_every": 3, "train.async_save": True, "guard.nonfinite": "stop"}
    run = failing(values, tmp_path, 4)
    try:
        with pytest.raises(RunError, match="step 4"):
            run.trainer.fit()
        assert (tmp_path / "checkpoints" / "step-00000003").is_dir()
    finally:
        run.trainer.saver.wait()
