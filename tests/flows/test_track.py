"""Trackers: what reaches TensorBoard and W&B, that no line is drawn twice, and missing packages in one line."""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ldit.config.sections import TrackConfig
from ldit.errors import ConfigError
from ldit.track import check_packages, numbers, trackers

RECORD = {
    "step": 7,
    "loss": 0.5,
    "mse": math.nan,
    "grad_norm": None,
    "attention_logit": [1.0, math.inf],
    "ema": {"a": 2, "b": {"c": 3}},
    "note": "text",
    "huge": 10**400,
}
FLAT = {"loss": 0.5, "mse": math.nan, "attention_logit/0": 1.0, "attention_logit/1": math.inf, "ema/a": 2, "ema/b/c": 3}


class FakeWriter:
    made: list["FakeWriter"] = []  # noqa: RUF012

    def __init__(self, folder: str, purge_step: int) -> None:
        self.folder, self.purge_step = folder, purge_step
        self.scalars: list[tuple[str, float, int]] = []
        self.flushed, self.closed = 0, False
        FakeWriter.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

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
    (tracker,) = trackers(TrackConfig(tensorboard=True), tmp_path, {}, committed_step=40)
    tracker.write(RECORD)
    (writer,) = writers
    assert (writer.folder, writer.purge_step) == (str(tmp_path / "tensorboard"), 41)
    assert [(name, step) for name, _, step in writer.scalars] == [(name, 7) for name in FLAT]
    assert writer.flushed == len(FLAT) and not writer.closed
    tracker.close()
    assert writer.closed


def test_wandb_goes_on_with_the_run_that_the_folder_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config, run = TrackConfig(wandb="emoji"), tmp_path / "xs"
    run.mkdir()
    for step in (7, 8):
        (tracker,) = trackers(config, run, {"train": {"lr": 1e-4}})
        tracker.write({**RECORD, "step": step})
        tracker.close()
    first, second = wandb.started
    assert first == second
    assert first["id"] == json.loads((run / "wandb.json").read_text())["id"] and len(first["id"]) == 12
    assert (first["project"], first["name"], first["resume"]) == ("emoji", "xs", "allow")
    assert (first["dir"], first["config"]) == (str(run), {"train": {"lr": 1e-4}})
    assert [step for step, _ in wandb.logged] == [7, 8] and wandb.logged[0][1].keys() == FLAT.keys()
    assert wandb.finished == 2
    (other := tmp_path / "other").mkdir()
    trackers(config, other, {})
    assert wandb.started[2]["id"] != first["id"]


def test_nothing_asked_for_is_nothing_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("wandb", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    check_packages(TrackConfig())
    assert trackers(TrackConfig(), tmp_path, {}) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("config", "module", "extra"),
    [
        (TrackConfig(tensorboard=True), "torch.utils.tensorboard", "tensorboard"),
        (TrackConfig(wandb="emoji"), "wandb", "wandb"),
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
    assert '\ntensorboard = ["tensorboard' in text and '\nwandb = ["wandb' in text


def test_faults_of_wandb_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb("no API key\nconfigured"))
    with pytest.raises(ConfigError, match=r"^track\.wandb: no API key configured$"):
        trackers(TrackConfig(wandb="emoji"), tmp_path, {})
    for damaged in ("", "[]", '{"id": 3}', '{"id": ""}', "{}"):
        (tmp_path / "wandb.json").write_text(damaged)
        with pytest.raises(ConfigError, match=r"wandb\.json: holds no W&B run id"):
            trackers(TrackConfig(wandb="emoji"), tmp_path, {})


def test_the_real_tensorboard_draws_no_step_twice(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last, committed in ((1, 8, 0), (5, 9, 4)):
        (tracker,) = trackers(TrackConfig(tensorboard=True), tmp_path, {}, committed)
        for step in range(first, last):
            tracker.write({**RECORD, "step": step})
        tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == FLAT.keys()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6, 7, 8]
