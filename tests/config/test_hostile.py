"""S2: whatever stands on the command line or in a run's config.json, the answer is one line that names the key, exit
code 2, and nothing written."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from counts import count

sys.path.insert(0, str(Path(__file__).parent))
from hostile import command, document, keys

from ldit.cli.main import main
from ldit.commands import train as flow
from ldit.config.experiment import Experiment
from ldit.config.run import RunConfig
from ldit.errors import ConfigError

BATCHES = 10
COMMANDS = range(count(250, 5000))
DOCUMENTS = range(count(250, 5000))
LONGEST = 1100  # characters of a message


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[RunConfig]:
    """Configurations that came through to training, which does nothing; the current folder is empty."""
    came: list[RunConfig] = []

    def stub(experiment: Experiment, *rest: Any) -> None:
        assert isinstance(experiment.config, RunConfig)
        came.append(experiment.config)

    monkeypatch.setattr(flow, "_train", stub)
    monkeypatch.chdir(tmp_path)
    return came


def answer(flags: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = main(["train", "tiny-cpu", "--out", "run", *flags])
    said = capsys.readouterr()
    assert said.out == ""
    return code, said.err


@pytest.mark.parametrize("batch", range(BATCHES))
def test_s2_hostile_flags(
    batch: int, trained: list[RunConfig], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for number in COMMANDS[batch::BATCHES]:
        flags, named = command(number)
        code, said = answer(flags, capsys)
        what = (number, [flag[:80] for flag in flags], said[:300])
        assert code == 2 and trained == [], what
        assert said.startswith("ldit: ") and said.count("\n") == 1 and said.rstrip("\n").isprintable(), what
        assert len(said) < LONGEST and "Traceback" not in said, what
        assert any(name in said for name in named), what
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("batch", range(BATCHES))
def test_s2_hostile_configurations(batch: int) -> None:
    """What a run's own record may hold when somebody edited it."""
    for number in DOCUMENTS[batch::BATCHES]:
        data, named = document(number)
        with pytest.raises(ConfigError) as error:
            RunConfig.from_json(json.loads(json.dumps(data))).check()
        said = str(error.value)
        assert named in said, (number, said)
        assert said.isprintable() and len(said) < LONGEST, (number, said)


def test_s2_the_sound_ones_pass(trained: list[RunConfig], capsys: pytest.CaptureFixture[str]) -> None:
    """The stub is reached by sound flags: refusals above are not those of a broken command line."""
    assert answer(["--train.lr", "0.5", "--guard.spike-z", "3", "--ema.power", "0.05", "0.1"], capsys) == (0, "")
    assert trained[0].train.lr == 0.5 and trained[0].ema.power == (0.05, 0.1)
    assert {"train.lr", "guard.limit", "parallel.timeout"} <= keys().keys()


TAKEN = [
    ("train.lr", "inf"), ("train.lr", "1e400"), ("objective.time_mean", "nan"), ("objective.time_std", "inf"),
    ("parallel.timeout", "inf"), ("parallel.timeout", "1e300"), ("train.seed", "9" * 23),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), TAKEN)
def test_s2_numbers_without_end(
    key: str, value: str, trained: list[RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    """Infinities, and numbers that no clock or generator takes."""
    code, said = answer([f"--{key}", value], capsys)
    assert code == 2 and key in said


@pytest.mark.parametrize("value", ["maybe", "1", "no", "x" * 2000, "\x1b[31m"])
def test_s2_switches(value: str, trained: list[RunConfig], capsys: pytest.CaptureFixture[str]) -> None:
    code, said = answer(["--train.async-save", value], capsys)
    assert code == 2 and "train.async" in said


@pytest.mark.parametrize("value", [None, 3, "x", [], [[]], True, 1.5, {}, {"format": None}, {"model": 1}])
def test_s2_no_configuration_at_all(value: Any) -> None:
    with pytest.raises(ConfigError, match="format"):
        RunConfig.from_json(value)
