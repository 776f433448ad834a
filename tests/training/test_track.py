"""Trackers: what reaches TensorBoard and W&B, that no line is drawn twice, and missing packages in one line."""

import errno
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldit.config.sections import TrackConfig
from ldit.errors import ConfigError
from ldit.track import MetricsFile, Trackers, check_packages, numbers, trackers

RECORD = {
    "step": 7,
    "loss": 0.5,
    "mse": math.nan,
    "grad_norm": None,
    "attention_logit": [1.0, math.inf],
    "ema": {"a": 2, "b": {"c": 3}},
    "note": "text",
}
FLAT = {"loss": 0.5, "mse": math.nan, "attention_logit/0": 1.0, "attention_logit/1": math.inf, "ema/a": 2, "ema/b/c": 3}
TAGS = [f"train/{name}" for name in FLAT]


class FakeWriter:
    made: list["FakeWriter"] = []  # noqa: RUF012

    def __init__(self, folder: str, purge_step: int) -> None:
        self.folder, self.purge_step = folder, purge_step
        self.scalars: list[tuple[str, float, int]] = []
        self.images: list[tuple[str, tuple[int, ...], int]] = []
        self.flushed, self.closed = 0, False
        FakeWriter.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def add_image(self, name: str, pixels: np.ndarray, step: int, dataformats: str) -> None:
        assert dataformats == "HWC" and pixels.dtype == np.uint8
        self.images.append((name, pixels.shape, step))

    def flush(self) -> None:
        self.flushed = len(self.scalars)

    def close(self) -> None:
        self.closed = True


class FakeWandb(ModuleType):
    class Error(Exception):
        pass

    def __init__(self, fault: str = "") -> None:
        super().__init__("wandb")
        self.fault, self.started, self.logged, self.finished = fault, [], [], 0

    def init(self, **options: Any) -> "FakeWandb":
        if self.fault:
            raise self.Error(self.fault)
        self.started.append(options)
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def writers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeWriter]]:
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = FakeWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    FakeWriter.made.clear()
    yield FakeWriter.made
    FakeWriter.made.clear()


def test_numbers_of_a_record() -> None:
    found = dict(numbers(RECORD))
    assert found.pop("grad_norm", 0) is None
    assert str(found) == str(FLAT).replace("2,", "2.0,").replace("3}", "3.0}")  # as text: nan is not equal to itself


def test_tensorboard_gets_every_number_at_its_step(tmp_path: Path, writers: list[FakeWriter]) -> None:
    _, tracker = trackers(TrackConfig(tensorboard=True), tmp_path, {}, committed_step=40)
    tracker.write(RECORD)
    (writer,) = writers
    assert (writer.folder, writer.purge_step) == (str(tmp_path / "tensorboard"), 41)
    assert [(name, step) for name, _, step in writer.scalars] == [(name, 7) for name in TAGS]
    assert writer.flushed == len(FLAT) and not writer.closed
    tracker.close()
    assert writer.closed


def test_wandb_goes_on_with_the_run_that_the_folder_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config, run = TrackConfig(wandb="emoji"), tmp_path / "xs"
    run.mkdir()
    for step in (7, 8):
        _, tracker = trackers(config, run, {"train": {"lr": 1e-4}})
        tracker.write({**RECORD, "step": step})
        tracker.close()
    first, second = wandb.started
    assert first == second
    assert first["id"] == json.loads((run / "wandb.json").read_text())["id"] and len(first["id"]) == 12
    assert (first["project"], first["name"], first["resume"]) == ("emoji", "xs", "allow")
    assert (first["dir"], first["config"]) == (str(run), {"train": {"lr": 1e-4}})
    assert [step for step, _ in wandb.logged] == [7, 8] and list(wandb.logged[0][1]) == TAGS
    assert wandb.finished == 2
    (other := tmp_path / "other").mkdir()
    trackers(config, other, {})
    assert wandb.started[2]["id"] != first["id"]


class FakeTrackio(ModuleType):
    def __init__(self) -> None:
        super().__init__("trackio")
        self.started: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished = 0

    def init(self, **options: Any) -> None:
        self.started.append(options)

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1

    Image = staticmethod(lambda path: f"image {path}")


def test_groups_and_grids_reach_every_tracker(
    tmp_path: Path, writers: list[FakeWriter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The grid of a step is sent after its record; trackio goes on with the run that the folder names."""
    wandb, trackio = FakeWandb(), FakeTrackio()
    wandb.Image = trackio.Image  # type: ignore[attr-defined]
    for module in (wandb, trackio):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    run = tmp_path / "xs"
    (run / "samples").mkdir(parents=True)
    grid = run / "samples" / "step-00000008.png"
    Image.new("RGB", (12, 5)).save(grid)
    record = {"step": 8, "loss": 1.0, "eps_mse": 0.5, "eps_mse_q1": 0.5, "fd_lite0": 3.0, "fid": 2.0, "psnr": 20.0}
    for _ in range(2):
        used = Trackers(trackers(TrackConfig(True, "emoji", "emoji"), run, {"a": 1}), run)
        used.write({"step": 7, "loss": 2.0})
        used.write(record)
        used.show(7)  # has none
        used.show(8)
        used.close()
    tags = ["train/loss", "heldout/eps_mse", "heldout/eps_mse_q1", "eval/fd_lite0", "eval/fid", "heldout/psnr"]
    assert [name for name, _, step in writers[-1].scalars if step == 8] == tags
    assert writers[-1].images == [("samples", (5, 12, 3), 8)]
    for package in (wandb, trackio):
        (first, one), (second, two), (third, shown) = package.logged[:3]
        assert (first, list(one), second, third) == (7, ["train/loss"], 8, 8) and list(two) == tags
        assert shown == {"samples": f"image {grid}"} and package.finished == 2
    one, two = trackio.started
    assert one == two and one["project"] == "emoji" and one["resume"] == "allow" and one["config"] == {"a": 1}
    assert one["name"] == f"xs-{json.loads((run / 'trackio.json').read_text())['id']}"


def test_tensorboard_goes_on_in_another_file_after_a_cut(tmp_path: Path, writers: list[FakeWriter]) -> None:
    """One that has the viewer discard later steps, which the file before it holds."""
    _, tracker = trackers(TrackConfig(tensorboard=True), tmp_path, {}, committed_step=2)
    tracker.write(RECORD)
    tracker.cut(4)
    tracker.write({**RECORD, "step": 5})
    first, second = writers
    assert first.closed and {step for _, _, step in first.scalars} == {7}
    assert (second.folder, second.purge_step, second.closed) == (first.folder, 5, False)
    assert {step for _, _, step in second.scalars} == {5} and second.flushed == len(FLAT)
    tracker.close()
    assert second.closed


def test_wandb_says_what_it_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The service takes nothing back; the run goes on in it as it is."""
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    metrics, tracker = trackers(TrackConfig(wandb="emoji"), tmp_path, {})
    metrics.cut(4)
    assert caplog.messages == []
    tracker.cut(4)
    assert caplog.messages == ["W&B keeps its old records of steps after 4; metrics.jsonl has the new ones"]
    assert (len(wandb.started), wandb.finished) == (1, 0)


class Place:
    """A tracker that keeps what it is told, and whose disk is full at some steps."""

    def __init__(self, full: tuple[int, ...] = ()) -> None:
        self.full = full
        self.told: list[object] = []

    def write(self, record: dict[str, Any]) -> None:
        if record["step"] in self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "events")
        self.told.append(record["step"])

    def cut(self, step: int) -> None:
        self.told.append(f"cut {step}")

    def close(self) -> None:
        self.told.append("closed")


def test_a_place_that_is_full_keeps_the_others_from_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Neither from that record nor from later ones; one line tells which is missing where."""
    first, second, third = places = Place(), Place(full=(2, 3)), Place()
    all_trackers = Trackers(places)
    for step in (1, 2, 3, 4):
        all_trackers.write({"step": step})
    all_trackers.cut(2)
    all_trackers.close()
    assert first.told == third.told == [1, 2, 3, 4, "cut 2", "closed"]
    assert second.told == [1, 4, "cut 2", "closed"]
    assert caplog.messages == [f"step {step} is missing in Place: No space left on device" for step in (2, 3)]


def test_a_line_of_metrics_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one does not begin in the middle of it."""
    metrics = MetricsFile(tmp_path / "metrics.jsonl", 0)
    metrics.write({"step": 1})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            metrics.write({"step": 2})
    metrics.write({"step": 3})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1}, {"step": 3}]


def test_nothing_asked_for_is_nothing_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("wandb", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    check_packages(TrackConfig())
    (metrics,) = trackers(TrackConfig(), tmp_path, {})
    assert isinstance(metrics, MetricsFile)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    ("config", "module", "extra"),
    [
        (TrackConfig(tensorboard=True), "torch.utils.tensorboard", "tensorboard"),
        (TrackConfig(wandb="emoji"), "wandb", "wandb"),
        (TrackConfig(trackio="emoji"), "trackio", "trackio"),
    ],
)
def test_a_missing_package_is_one_line(
    config: TrackConfig, module: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    for ask in (lambda: check_packages(config), lambda: trackers(config, tmp_path, {})):
        with pytest.raises(ConfigError, match=rf"^track\.{extra}: .*pip install 'large-dit\[{extra}\]'\)$"):
            ask()


def test_the_extras_exist() -> None:
    text = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    assert '\ntensorboard = ["tensorboard' in text and '\nwandb = ["wandb' in text and '\ntrackio = ["' in text


def test_faults_of_wandb_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb("no API key\nconfigured"))
    with pytest.raises(ConfigError, match=r"^track\.wandb: no API key configured$"):
        trackers(TrackConfig(wandb="emoji"), tmp_path, {})
    for damaged in ("", "[]", '{"id": 3}', '{"id": ""}', "{}"):
        (tmp_path / "wandb.json").write_text(damaged)
        with pytest.raises(ConfigError, match=r"wandb\.json: holds no run id"):
            trackers(TrackConfig(wandb="emoji"), tmp_path, {})


def test_the_real_tensorboard_draws_no_step_twice(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last, committed in ((1, 8, 0), (5, 9, 4)):
        _, tracker = trackers(TrackConfig(tensorboard=True), tmp_path, {}, committed)
        for step in range(first, last):
            tracker.write({**RECORD, "step": step})
        tracker.close()
    tracker = trackers(TrackConfig(tensorboard=True), tmp_path, {}, 8)[1]
    for loss in (0.25, 0.125):  # the run goes back to step 6 and on in another way, twice
        tracker.cut(6)
        for step in (7, 8):
            tracker.write({"step": step, "loss": loss})
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == FLAT.keys()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [event.value for event in events.Scalars("loss")] == [0.5] * 6 + [0.125] * 2
