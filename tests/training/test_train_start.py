"""The start of a run: RUN/config.json is written once the state stands, and not by a start that is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import make_folder, over, said

from ldit.checkpoint.run import step_folder
from ldit.commands import train as flow
from ldit.commands.train import run as train
from ldit.config.run import RunConfig
from ldit.errors import ConfigError, LditError, SourceError
from ldit.storage import manifest
from ldit.training.tasks.diffusion import DiffusionTask

MISSING = "no held-out images: no held-out loss is measured (data.heldout names a list)"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`, a finished run `run` over it, and `begun`, a run that died before its first commit."""
    base = tmp_path_factory.mktemp("start")
    make_folder(base / "data")
    assert train(over(base / "data"), base / "run") == 0
    (base / "begun").mkdir()
    shutil.copy(base / "run" / "config.json", base / "begun")
    return base


@pytest.mark.parametrize(
    ("changes", "kind", "named"),
    [
        ({"train.init_from": "nowhere/at-all"}, SourceError, "nowhere/at-all"),
        ({"train.init_from": "RUN", "model.dim": 32}, SourceError, "no block fits"),
        ({"parallel.tp": 3}, ConfigError, "parallel.tp: 3 does not divide model.n_heads 2"),
        ({"parallel.tp": 2}, ConfigError, "tp 2"),
        ({"train.micro_batch_size": 3}, ConfigError, "train.micro_batch_size"),
    ],
)
def test_a_refused_start_leaves_the_configuration(
    changes: dict[str, Any], kind: type[LditError], named: str, base: Path, tmp_path: Path
) -> None:
    """Of the earlier run, which had not come to a commit; and writes none where none was."""
    if "train.init_from" in changes:
        changes = {**changes, "train.init_from": changes["train.init_from"].replace("RUN", str(base / "run"))}
    begun = shutil.copytree(base / "begun", tmp_path / "begun")
    for out in (begun, tmp_path / "none"):
        with pytest.raises(kind) as error:
            train(over(base / "data", changes), out)
        assert named in str(error.value) and "\n" not in str(error.value)
    assert (begun / "config.json").read_bytes() == (base / "begun" / "config.json").read_bytes()
    assert not (tmp_path / "none" / "config.json").exists()


def test_a_step_that_cannot_be_restored_leaves_the_configuration(base: Path, tmp_path: Path) -> None:
    """Its files are those of the manifest, and one of them is no record of training."""
    run = shutil.copytree(base / "run", tmp_path / "run")
    step = step_folder(run, 2)
    record = step / "state" / "trainer.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "scaler": 3}))
    (step / manifest.NAME).write_text(json.dumps(manifest.build(step)))
    with pytest.raises(SourceError, match="not a training record"):
        train(over(base / "data", {"train.steps": 4}), run)
    assert (run / "config.json").read_bytes() == (base / "run" / "config.json").read_bytes()


def test_the_configuration_is_written_once_the_state_stands(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the weights, before the first step."""
    seen: list[tuple[str, bool]] = []

    def look(name: str, real: Any) -> Any:
        def call(*arguments: Any) -> Any:
            seen.append((name, (tmp_path / "run" / "config.json").exists()))
            return real(*arguments)

        return call

    monkeypatch.setattr(DiffusionTask, "begin", look("start", DiffusionTask.begin))
    monkeypatch.setattr(flow.Trainer, "fit", look("fit", flow.Trainer.fit))
    config = over(base / "data")
    assert train(config, tmp_path / "run") == 0
    assert seen == [("start", False), ("fit", True)]
    assert RunConfig.from_json(json.loads((tmp_path / "run" / "config.json").read_text())) == config


def test_measurements_without_a_list_are_told_once(base: Path, tmp_path: Path) -> None:
    """Where the recipe asks for them and the folder has no list; elsewhere there is nothing to tell."""
    (make_folder(tmp_path / "listed") / "heldout.txt").write_text("a/0.png\n")
    asked = {"heldout.every": 1, "heldout.num": 2}
    for name, config in (
        ("without", over(base / "data", asked)),
        ("unasked", over(base / "data")),
        ("with", over(tmp_path / "listed", asked)),
    ):
        with said() as lines:
            assert train(config, tmp_path / name) == 0
        assert [line for line in lines if "held-out" in line] == ([MISSING] if name == "without" else []), name
        assert ("eps_mse" in (tmp_path / name / "metrics.jsonl").read_text()) == (name == "with"), name


@pytest.mark.parametrize("precision", ["tf32", "fp32"])
def test_products_are_rounded_while_a_tf32_run_trains(
    precision: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    before = torch.get_float32_matmul_precision()
    monkeypatch.setattr(flow.Trainer, "fit", lambda trainer: seen.append(torch.get_float32_matmul_precision()))
    assert train(over(base / "data", {"train.precision": precision}), tmp_path / "run") == 0
    assert seen == ["high" if precision == "tf32" else before] and torch.get_float32_matmul_precision() == before
