"""Saves beside training: one at a time, their failures said once, their copies their own."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from smallrun import same_bits, small, tensors, trainer

from ldit.checkpoint.sets import read_set
from ldit.errors import RunError
from ldit.train import state_io
from ldit.train.saver import Saver, Staging
from ldit.train.step import Outcome
from ldit.train.trainer import SAVE_FAILED, Hook


def test_it_runs_beside_the_caller() -> None:
    gate, done = threading.Event(), []
    saver = Saver(beside=True)
    saver.start(lambda: (gate.wait(30), done.append(threading.current_thread())))
    assert done == [] and not saver.failed
    gate.set()
    saver.wait()
    assert done[0] is not threading.current_thread()


def test_or_at_once() -> None:
    done: list[int] = []
    Saver(beside=False).start(lambda: done.append(1))
    assert done == [1]
    with pytest.raises(OSError, match="full"):
        Saver(beside=False).start(_fail)


def _fail() -> None:
    raise OSError("full")


def test_one_at_a_time() -> None:
    """The second begins when the first has ended."""
    saver, running, most, gate = Saver(beside=True), [], [], threading.Event()

    def work(name: int) -> None:
        running.append(name)
        most.append(len(running))
        gate.wait(30)
        running.remove(name)

    saver.start(lambda: work(1))
    threading.Timer(0.05, gate.set).start()
    saver.start(lambda: work(2))
    saver.wait()
    assert most == [1, 1]


def test_a_failure_is_said_once() -> None:
    """By `failed` until someone waits, by `wait` once, and by the next `start` where nobody waited."""
    saver = Saver(beside=True)
    saver.start(_fail)
    assert saver._thread is not None
    saver._thread.join()
    assert saver.failed
    with pytest.raises(OSError, match="full"):
        saver.wait()
    assert not saver.failed
    saver.wait()
    saver.start(_fail)
    done: list[int] = []
    with pytest.raises(OSError, match="full"):
        saver.start(lambda: done.append(1))
    saver.start(lambda: done.append(2))
    saver.wait()
    assert done == [2]


def test_copies_do_not_follow() -> None:
    """A copy keeps its numbers when the value changes, whatever its dtype and shape, up to the next `begin`."""
    parameter = torch.nn.Parameter(torch.arange(4.0))
    values = [parameter, torch.tensor(7.0), torch.ones(3, 5, dtype=torch.bfloat16), torch.empty(0, 2), torch.arange(9)]
    expected = [value.detach().clone() for value in values]
    staging = Staging()
    for _ in range(2):  # the second time in memory that is there already
        staging.begin(values)
        copies = [staging.copy(value) for value in values]
        staging.settle()
        kept = [value.detach().clone() for value in values]
        for value in values:
            value.detach().zero_()
        assert all(same_bits(copy, value) for copy, value in zip(copies, expected, strict=True))
        assert not any(copy.requires_grad for copy in copies)
        for value, number in zip(values, kept, strict=True):
            value.detach().copy_(number)


def test_the_memory_is_kept_and_grows() -> None:
    staging, value = Staging(), torch.ones(100)
    staging.begin([value])
    first = staging.copy(value)
    staging.begin([value])
    assert staging.copy(torch.zeros(100)).data_ptr() == first.data_ptr() and first.abs().max() == 0
    many = [torch.full((100,), float(i)) for i in range(5)]
    staging.begin(many)
    assert [copy.unique().item() for copy in [staging.copy(one) for one in many]] == [0, 1, 2, 3, 4]


def failing(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    real = state_io.write_step

    def write(run: Path, step: int, *rest: Any) -> Path:
        if step == at:
            raise OSError("full")
        return real(run, step, *rest)

    monkeypatch.setattr(state_io, "write_step", write)


@pytest.mark.parametrize("beside", [False, True])
def test_a_save_that_fails_ends_the_run_with_its_own_error(
    beside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the next step at the latest, as this process's error; the commit before it stands."""
    failing(monkeypatch, 4)
    values = {"train.async_save": beside, "train.checkpoint_every": 2, "train.steps": 6}
    run = trainer(small(values), tmp_path)
    with pytest.raises(OSError, match="full"):
        run.trainer.fit()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


def test_a_save_that_fails_elsewhere_ends_the_run_here(tmp_path: Path) -> None:
    """Another process's flag, which a step's sum brings."""
    run = trainer(small(), tmp_path)
    flags = [0.0] * SAVE_FAILED + [1.0]
    with pytest.raises(RunError, match="another process"):
        run.trainer._rolls_back(Outcome({"loss": 1.0, "grad_norm": 1.0}, "", tuple(flags)))


@pytest.mark.parametrize("kind", ["checkpoints", "snapshots"])
def test_a_slow_save_keeps_its_step(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that take longer than the steps to the next save hold the numbers of their own step."""
    name = "write_step" if kind == "checkpoints" else "write_folder"
    real, seen = getattr(state_io, name), {}

    def slow(*given: Any) -> Path:
        time.sleep(0.2)  # several steps
        return real(*given)

    monkeypatch.setattr(state_io, name, slow)
    every = "train.checkpoint_every" if kind == "checkpoints" else "ema.snapshot_every"
    config = small({"train.async_save": True, "train.steps": 4, "ema.power": (0.1,), every: 1})
    hooks = [Hook(1, lambda state: seen.setdefault(state.step, tensors(state)) and None)]
    run = trainer(config, tmp_path, hooks=hooks)
    run.trainer.fit()
    stem = "model" if kind == "checkpoints" else "power-0.1000"
    prefix = "master" if kind == "checkpoints" else stem
    folders = sorted((tmp_path / kind).iterdir())
    assert len(folders) == 4
    for folder in folders:
        step = int(folder.name.rpartition("-")[2])
        for parameter, value in read_set(folder, stem):
            assert torch.equal(value, seen[step][f"{prefix} {parameter}"]), (folder.name, parameter)
