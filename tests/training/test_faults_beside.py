"""Faults beside the steps cost what they must and no more: what the data, a full disk, a grid or a log line does."""

import errno
import json
import logging
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from calls import in_child
from folders import make_folder, over
from PIL import Image
from smallrun import small, trainer

from ldit.checkpoint.run import committed_steps
from ldit.commands.train import run as train
from ldit.errors import DataError, RunError
from ldit.storage import manifest
from ldit.track import METRICS, MetricsFile
from ldit.training import checkpointing

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("fault", [DataError("a.png is not an image"), OSError("no disk"), ZeroDivisionError("bug")])
def test_whatever_ends_the_run_the_save_under_way_is_committed(
    fault: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The save of step 3 has written nothing when step 4 gets no batch; it is there when `fit` has raised, for the
    process ends then and its threads with it."""
    gate, real = threading.Event(), checkpointing.write_step

    def held(*given: Any) -> Path:
        assert gate.wait(30)
        time.sleep(0.3)  # who does not wait for it is gone by then
        return real(*given)

    monkeypatch.setattr(checkpointing, "write_step", held)
    run = trainer(small({"train.checkpoint_every": 3, "train.async_save": True}), tmp_path)
    sound = run.trainer.batches

    def batches(*where: int) -> Iterator[Any]:
        for batch in sound(*where):
            if run.state.step == 3:
                gate.set()
                raise fault
            yield batch

    run.trainer.batches = batches
    try:
        with pytest.raises(type(fault), match=str(fault)):
            run.trainer.fit()
        assert [step for step, _ in committed_steps(tmp_path)] == [3]
        manifest.verify(tmp_path / "checkpoints" / "step-00000003")
    finally:
        run.trainer.saver.wait()


def test_snapshots_of_a_run_that_never_committed_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends with snapshots of steps 1, 2 and 3 and no checkpoint; the fresh run, of another seed, has its own
    alone."""
    out, data = tmp_path / "run", make_folder(tmp_path / "data")
    values: dict[str, Any] = {"ema.power": (0.1,), "ema.snapshot_every": 1, "train.steps": 3}
    with monkeypatch.context() as patch:
        patch.setattr(checkpointing, "write_step", raising(RunError("killed")))
        with pytest.raises(RunError, match="killed"):
            train(over(data, values), out)
    assert names(out / "snapshots") == [f"step-{step:08d}" for step in (1, 2, 3)] and committed_steps(out) == []
    train(over(data, {**values, "train.seed": 1, "ema.snapshot_every": 2, "train.steps": 2}), out)
    assert names(out / "snapshots") == ["step-00000002"]


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*given: Any, **options: Any) -> Any:
        raise error

    return fail


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------- images and log lines


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_grid_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One for each grid, with its step and why; the run goes on to its last step."""
    config, out = over(make_folder(tmp_path / "data"), {"train.sample_every": 1, "sampling.steps": 2}), tmp_path / "run"
    monkeypatch.setattr(Image.Image, "save", raising(FULL))
    assert train(config, out) == 0
    assert warnings(caplog) == [f"step {step}: no sample grid: {FULL}" for step in (1, 2)]
    assert [step for step, _ in committed_steps(out)] == [2]


def test_a_log_line_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The run goes on to its last step, and the lines of the other steps are there."""
    out, real = tmp_path / "run", MetricsFile.write

    def write(self: MetricsFile, record: dict[str, Any]) -> None:
        if record["step"] == 2:
            raise FULL
        real(self, record)

    monkeypatch.setattr(MetricsFile, "write", write)
    assert train(over(make_folder(tmp_path / "data"), {"train.steps": 3}), out) == 0
    assert warnings(caplog) == [f"step 2 is missing in MetricsFile: {FULL.strerror}"]
    assert steps_of(out / METRICS) == [1, 3]
    assert [step for step, _ in committed_steps(out)] == [3]


@pytest.mark.parametrize("taken", [0, 1, 23, 45])
def test_a_line_is_written_whole_or_not_at_all(taken: int, tmp_path: Path) -> None:
    """The disk takes some bytes of the line of step 3 and no more: the kernel's own refusal, in a child. Later lines
    follow whole ones, and a resume keeps them all."""
    path = tmp_path / METRICS
    assert in_child(lambda: refused_in_the_middle(path, taken)) == 0
    assert steps_of(path) == [1, 2, 4]
    before = path.read_bytes()
    MetricsFile(path, 4)
    assert path.read_bytes() == before


def refused_in_the_middle(path: Path, taken: int) -> int:
    """Lines of 46 bytes; 0 = the third was refused."""
    metrics = MetricsFile(path, 0)
    for step in (1, 2):
        metrics.write(record(step))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + taken, hard))
    with pytest.raises(OSError, match="large"):
        metrics.write(record(3))
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    metrics.write(record(4))
    return 0


def record(step: int) -> dict[str, Any]:
    return {"step": step, "words": "a line of some length"}


def steps_of(path: Path) -> list[int]:
    """Steps of the lines, each of which must be whole."""
    text = path.read_text()
    assert text.endswith("\n")
    return [json.loads(line)["step"] for line in text.splitlines()]
