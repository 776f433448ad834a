"""The examples of docs/extend.md run as they are printed, and a recipe in a user's file resumes exactly."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import ldit
from ldit.cli.main import main
from ldit.commands.train import TASKS
from ldit.config.recipes.registry import recipe
from ldit.errors import ConfigError, SourceError
from ldit.rng import normal
from ldit.sampling.grids import build_grid
from ldit.sampling.solvers import SOLVERS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "extend.md"
BLOCKS = re.findall(r"^```python\n# (\w+)\.py\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
SHORT = ["--train.batch-size", "4", "--train.log-every", "1", "--train.sample-every", "0", "--heldout.every", "0",
         "--train.attention-every", "0", "--data.workers", "0"]  # fmt: skip


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The files of the page, in the working directory. What importing them changes is undone."""
    for name, text in BLOCKS:
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    solvers, tasks = dict(SOLVERS), dict(TASKS)
    yield tmp_path
    for table, before in ((SOLVERS, solvers), (TASKS, tasks)):
        table.clear()
        table.update(before)
    for name, _ in BLOCKS:
        sys.modules.pop(name, None)


def train(name: str, run: Path, *flags: str) -> list[dict[str, Any]]:
    """The metrics of `ldit train NAME`, which must succeed."""
    assert main(["train", name, "--out", str(run), *SHORT, *flags]) == 0
    return metrics(run)


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in metrics(run)]


def test_every_block_of_the_page_has_a_name_and_a_test() -> None:
    names = [name for name, _ in BLOCKS]
    assert len(names) == PAGE.read_text().count("```python")
    assert sorted(names) == sorted(
        ["my_experiment", "my_loss", "my_process", "my_solver", "my_samples", "my_network", "my_trainable"]
    )


def test_a_loss(files: Path) -> None:
    records = train("my_loss.py:experiment", files / "run", "--train.steps", "2", "--heldout.every", "2",
                    "--heldout.num", "4")  # fmt: skip
    for record in records:
        assert record["loss"] == pytest.approx(record["mse"] + 0.1 * record["absolute"])
    assert records[-1]["eps_mse"] > 0
    assert len(ldit.load(files / "run")(class_labels=[0], steps=2)) == 1  # without the file


def test_a_process(files: Path) -> None:
    """A network that knows the data gives the data back, and a trained one can be sampled."""
    own = importlib.import_module("my_process")
    process, x0, noise, t = own.TrigFlow(), torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8), torch.full((4,), 0.3)
    level = process.level(0.3)
    assert process.level_of_ratio(level.sigma / level.alpha).noise_time == pytest.approx(0.3)
    x = process.q_sample(x0, t, noise)
    estimate = process.denoised(level.alpha * noise - level.sigma * x0, x, level)
    torch.testing.assert_close(estimate.x0, x0, atol=1e-6, rtol=0)
    torch.testing.assert_close(estimate.eps, noise, atol=1e-6, rtol=0)
    exact = process.losses(lambda x_t, time: level.alpha * noise - level.sigma * x0, x0, t, noise)
    assert exact["loss"].max() < 1e-12
    run = files / "run"
    # The run's own sample grids and whoever has the file sample with the process of the file.
    train("my_process.py:experiment", run, "--train.steps", "2", "--train.sample-every", "2")
    pipe = ldit.load(run, experiment="my_process.py:experiment", device="cpu", inference=None)
    made = pipe.sample_latents(class_labels=[0], seed=5, steps=3, solver="euler", guidance=1.0)
    x = normal((3, 16, 16), 5, "picture")[None]
    for a, b in pairwise(build_grid(process, "3", "uniform")):
        estimate = process.denoised(pipe.model(x, torch.full((1,), a.time), torch.tensor([0])), x, a)
        x = b.alpha * estimate.x0 + b.sigma * estimate.eps
    torch.testing.assert_close(made, x, atol=1e-5, rtol=0)
    grid = ["--class-labels", "0", "--steps", "2", "--guidance", "1", "--image-save-path", "grid.png"]
    assert main(["sample", str(run), *grid, "--experiment", "my_process.py:experiment"]) == 0
    # Without the file the package's process would be wrong, silently.
    with pytest.raises(SourceError, match=r"its process is not of this package \(my_process\.TrigFlow\)"):
        ldit.load(run)
    with pytest.raises(ConfigError, match=r"objective: .* my_process\.TrigFlow, this start has the package's own"):
        ldit.train(str(run), run)


def test_a_solver(files: Path) -> None:
    importlib.import_module("my_solver")
    pipe = ldit.load("emoji64-class-xs", device="cpu")
    made = pipe.sample(class_labels=["food"], steps=2, solver="ddim-clipped", guidance=1.0, output_type="latent")
    assert made.shape == (1, 3, 64, 64) and made.abs().max() <= 1


def test_a_network(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train("my_network.py:experiment", files / "run", "--train.steps", "2")
    experiment = importlib.import_module("my_network").experiment()
    (image,) = ldit.load(files / "run", experiment=experiment)(class_labels=[0], steps=2)
    assert isinstance(image, Image.Image)
    assert main(["sample", str(files / "run"), "--num", "4", "--out", "set", "--steps", "2", "--experiment",
                 "my_network.py:experiment"]) == 0  # fmt: skip
    assert len(list((files / "set").glob("*.png"))) == 4
    assert json.loads((files / "set" / "samples.json").read_text())["experiment"] == {"network": "my_network.network"}
    with pytest.raises(SourceError, match=r"its network is not of this package \(my_network\.network\)"):
        ldit.load(files / "run")
    assert main(["sample", str(files / "run")]) == 2
    assert "my_network.network" in capsys.readouterr().err.splitlines()[-1]


def test_a_trainable(files: Path) -> None:
    flags = ("--data.path", "emoji64", "--data.image-size", "32", "--data.max-per-class", "2", "--model.widths", "8",
             "16", "--train.warmup", "0", "--train.cooldown", "0")  # fmt: skip
    plain = train("extractor-small", files / "plain", "--train.steps", "1", *flags)
    focal = train("my_trainable.py:experiment", files / "run", "--train.steps", "1", *flags)
    assert 0 < focal[0]["loss"] < plain[0]["loss"]
    assert len(train("my_trainable.py:experiment", files / "run", "--train.steps", "2", *flags)) == 2  # it resumes


def test_a_recipe_killed_and_resumed_has_the_same_losses(files: Path) -> None:
    """SIGKILL, then the same command. The data set and the loss are the user's; all runs have the same threads."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    flags = [*SHORT, "--train.steps", "20", "--train.checkpoint-every", "4"]
    command = [sys.executable, "-m", "ldit", "train", "my_experiment.py:recipe", *flags, "--out"]
    with subprocess.Popen([*command, "killed"], stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("step 6/"):
                process.kill()
        assert process.wait() == -signal.SIGKILL
    assert len(losses(files / "killed")) < 20
    for run in ("killed", "whole"):
        subprocess.run([*command, run], check=True, capture_output=True, env=environment)
    assert losses(files / "killed") == losses(files / "whole") and len(losses(files / "whole")) == 20
    assert len(ldit.load(files / "whole")(class_labels=["square"], steps=2)) == 1  # without the file


def test_in_python_a_data_set_is_a_keyword(files: Path) -> None:
    """Twice, for the package `ldit.train` has the same name as the function."""
    data = importlib.import_module("my_samples").Discs()
    config = recipe("tiny-cpu")
    config = replace(
        config,
        model=replace(config.model, num_classes=2),
        train=replace(config.train, steps=1, batch_size=4, sample_every=0),
        heldout=replace(config.heldout, every=0),
    )
    assert ldit.train(config, files / "run", data=data) == files / "run"
    assert ldit.train(config, files / "run", data=data) == files / "run"
    assert ldit.load(files / "run").spec.class_names == ("disc", "square")
