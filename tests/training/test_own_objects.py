"""Objects of the user's: what they may be, and one line for what they may not."""

import json
import re
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ldit
from ldit.checkpoint.run import step_folder
from ldit.cli.main import main
from ldit.config.autoencoder import AutoencoderRun
from ldit.config.classifier import ClassifierRun
from ldit.config.experiment import identity_of, name_of
from ldit.config.recipes.registry import diffusion_recipe, find_experiment
from ldit.config.run import RunConfig
from ldit.config.sections import ObjectiveConfig
from ldit.config.spec import FlowConfig
from ldit.diffusion import DDPM, Flow, Prediction
from ldit.diffusion.process import samples_alike
from ldit.errors import ConfigError, DataError
from ldit.nn.dit import Block
from ldit.sampling.fast.packed import is_packable
from ldit.storage import manifest
from ldit.storage.names import TRAINER
from ldit.training.optim import _is_matrix


class Convolution(nn.Module):
    """A network without any part of the package's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.scale = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(1, 3)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.conv(x) + self.scale(t[:, None])[..., None, None]


def network(config: Any) -> nn.Module:
    return Convolution()


def buffered(config: Any) -> nn.Module:
    model = Convolution()
    model.register_buffer("frequencies", torch.ones(3))
    return model


def none(config: Any) -> None:
    return None


def short(**train: Any) -> RunConfig:
    config = diffusion_recipe("tiny-cpu")
    changes: dict[str, Any] = {"steps": 2, "batch_size": 4, "log_every": 1, **train}
    return replace(
        config,
        process=FlowConfig(),
        model=replace(config.model, learn_sigma=False),
        train=replace(config.train, **changes),
        heldout=replace(config.heldout, every=0),
    )


def test_a_network_without_attention_trains_to_its_end_and_is_sampled(tmp_path: Path) -> None:
    """It has no attention logits to look at, and no inference copy."""
    experiment = ldit.Experiment(config=short(attention_every=1, sample_every=2), network=network)
    ldit.train(experiment, tmp_path / "run")
    assert "attention_logit" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert len(ldit.load(tmp_path / "run", experiment=experiment)(class_labels=[0], steps=2)) == 1


@pytest.mark.parametrize(
    ("build", "message"),
    [(buffered, "has the buffer frequencies"), (none, "must return a torch.nn.Module, got a NoneType")],
)
def test_a_network_that_cannot_be_trained(build: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        ldit.train(ldit.Experiment(config=short(), network=build), tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Returns(Flow):
    """Losses that are what `change` makes of them."""

    change: Any = None

    def losses(self, predict: Any, x0: Tensor, t: Tensor, noise: Tensor) -> Any:
        return type(self).change(super().losses(predict, x0, t, noise))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda losses: losses["loss"], "must return a dict with 'loss'"),
        (lambda losses: {"mse": losses["mse"]}, "must return a dict with 'loss'"),
        (
            lambda losses: {**losses, "loss": losses["loss"].mean()},
            r"'loss' must be a tensor of shape \(4,\), a value a sample, got \(\)",
        ),
        (lambda losses: {**losses, "extra": 1.0}, "'extra' must be a tensor .* got float"),
        (lambda losses: {**losses, "best": losses["loss"]}, "the name 'best' is taken"),
        (lambda losses: {**losses, "count_q1": losses["loss"]}, "the name 'count_q1' is taken"),
        (lambda losses: {**losses, "eps_mse_q9": losses["loss"]}, "the name 'eps_mse_q9' is taken"),
    ],
)
def test_losses_of_another_form(change: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Returns, "change", change)
    with pytest.raises(ConfigError, match=rf"Returns\.losses\(\).*{message}"):
        ldit.train(ldit.Experiment(config=short(), objective=Returns()), tmp_path / "run")


def test_every_name_that_is_free_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Returns, "change", lambda losses: {**losses, "iou_q1": torch.full_like(losses["loss"], 3.0)})
    ldit.train(ldit.Experiment(config=short(), objective=Returns()), tmp_path / "run")
    assert '"iou_q1": 3.0' in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_an_objective_that_is_no_process(tmp_path: Path) -> None:
    class Loss:
        def losses(self) -> None: ...

    with pytest.raises(ConfigError, match=r"objective: .*Loss has no .*denoised.*; subclass"):
        ldit.train(ldit.Experiment(config=short(), objective=Loss()), tmp_path / "run")


@pytest.mark.parametrize(
    ("own", "changes", "message"),
    [
        (
            {"objective": Flow()},
            {"objective": ObjectiveConfig(min_snr=5.0)},
            r"objective\.min_snr: an objective of one's",
        ),
        ({"objective": Flow()}, {"objective": ObjectiveConfig(direction=1.0)}, r"objective\.direction: an objective"),
        ({"objective": Flow()}, {"mid_layer": 1}, r"model\.mid_layer: an objective of one's own does not have it"),
        ({"network": network}, {"class_tokens": 2}, r"model\.class_tokens: a network of one's own does not have it"),
        ({"network": network}, {"objective": ObjectiveConfig(dropout=0.1)}, r"objective\.dropout: a network of one's"),
    ],
)
def test_settings_without_effect(own: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    config = short()
    model = {name: value for name, value in changes.items() if name != "objective"}
    config = replace(config, model=replace(config.model, **model), objective=changes.get("objective", config.objective))
    with pytest.raises(ConfigError, match=message):
        ldit.Experiment(config=config, **own)


def test_muon_needs_matrices(tmp_path: Path) -> None:
    config = short()
    config = replace(config, optim=replace(config.optim, kind="muon"))
    with pytest.raises(ConfigError, match=r"optim\.kind: muon .* this network has none"):
        ldit.train(ldit.Experiment(config=config, network=network), tmp_path / "run")
    assert _is_matrix("layers.3.attention.wk_y.weight") and _is_matrix("layers.0.feed_forward.w2.weight")
    for name in ("layers.0", "layers.0.attention.q_norm.weight", "layers.0.attention.wq.lora_A", "x_embedder.weight"):
        assert not _is_matrix(name)


def test_a_file_named_as_a_module(tmp_path: Path) -> None:
    (tmp_path / "random.py").write_text("def recipe(): ...")
    with pytest.raises(ConfigError, match=r"random\.py: there is a module 'random' already"):
        find_experiment(f"{tmp_path / 'random.py'}:recipe")


def test_configurations_of_other_kinds_are_sound_by_default() -> None:
    for config in (AutoencoderRun(), ClassifierRun()):
        replace(config, data=replace(config.data, path="images", image_size=64)).check()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def recipe(:", r"cannot be imported: SyntaxError: .*own\.py, line 1"),
        ("import nosuchmodule", r"cannot be imported: ModuleNotFoundError: .*\(own\.py, line 1, in <module>\)"),
        (
            "def recipe():\n    return 1 / 0",
            r"own\.py:recipe failed: ZeroDivisionError: .*\(own\.py, line 2, in ",
        ),
        ("def recipe(x): ...", r"own\.py:recipe failed: TypeError: .*missing 1 required positional argument"),
        (
            "def recipes(): ...\ndef _hidden(): ...",
            r"no function 'recipe' \(did you mean recipes\?\) \(it has: recipes",
        ),
        ("def recipe(): return 3", r"must return a RunConfig or an Experiment, got int"),
    ],
)
def test_a_file_whose_recipe_cannot_be_had(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(text)
    with pytest.raises(ConfigError, match=message):
        find_experiment(f"{tmp_path / 'own.py'}:recipe")
    with pytest.raises(ConfigError, match=r"own\.py:FUNCTION"):
        find_experiment(str(tmp_path / "own.py"))


FAILING = """
from dataclasses import dataclass, replace
import ldit
from ldit.config.recipes.registry import recipe as bundled
from ldit.config.spec import FlowConfig
from ldit.diffusion import Flow

class Mine(Flow):
    def losses(self, predict, x0, t, noise):
        return undefined

def recipe():
    return ldit.Experiment(config=replace(bundled("tiny-cpu"), process=FlowConfig()), objective=Mine())
"""


def test_the_line_of_the_users_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the package called it."""
    (tmp_path / "failing.py").write_text(FAILING)
    assert main(["train", f"{tmp_path / 'failing.py'}:recipe", "--out", str(tmp_path / "run")]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "ldit: failed: NameError: name 'undefined' is not defined (failing.py, line 10, in losses)"


class Points:
    """A data set object."""

    names = ()

    def __len__(self) -> int:
        return 8

    def fingerprint(self) -> str:
        return "points"

    def read(self, index: int) -> Any:
        return np.full((16, 16, 3), index * 20, np.uint8), None


def test_a_run_directory_does_not_know_the_users_data(tmp_path: Path) -> None:
    config = short()
    config = replace(config, model=replace(config.model, num_classes=0))
    ldit.train(config, tmp_path / "run", data=Points())
    with pytest.raises(DataError, match=r"trained on an object, .*Points; resume it with the recipe"):
        ldit.train(str(tmp_path / "run"))
    with pytest.raises(DataError, match=r"data: give an object, Points\(\), not the class Points"):
        ldit.train(config, tmp_path / "run", data=Points)


def test_settings_of_an_objective_are_kept(tmp_path: Path) -> None:
    """A weight that was changed in the file would go on with another loss."""
    weighted = dataclass(frozen=True)(type("Weighted", (Flow,), {"__annotations__": {"weight": float}, "weight": 1.0}))
    ldit.train(ldit.Experiment(config=short(), objective=weighted()), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"objective: .*Weighted, this start has .*Weighted\(weight=2\.0\)"):
        ldit.train(ldit.Experiment(config=short(), objective=weighted(weight=2.0)), tmp_path / "run")
    ldit.train(ldit.Experiment(config=short(steps=3), objective=weighted()), tmp_path / "run")


def test_a_step_of_an_older_version_does_not_name_objects(tmp_path: Path) -> None:
    """Such a run goes on, with the object that it had."""
    experiment = ldit.Experiment(config=short(), objective=Returns(), network=network)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Returns, "change", lambda losses: losses)
        ldit.train(experiment, tmp_path / "run")
        folder = step_folder(tmp_path / "run", 2)
        trainer = json.loads((folder / TRAINER).read_text())
        assert trainer["data"].pop("objective").endswith("Returns") and trainer["data"].pop("network")
        (folder / TRAINER).write_text(json.dumps(trainer))
        (folder / manifest.NAME).write_text(json.dumps(manifest.build(folder)))
        ldit.train(replace(experiment, config=short(steps=3)), tmp_path / "run")
    assert step_folder(tmp_path / "run", 3).is_dir()


@dataclass(frozen=True)
class Weighing(DDPM):
    weight: Any = None


def test_an_identity_is_the_same_in_every_process() -> None:
    """No address of a function, no table of a thousand numbers, and no name of a script's module."""
    words = identity_of(Weighing(weight=network))
    assert re.fullmatch(r"\S+Weighing\(kept=[0-9a-f]{16}, weight=\S+\.network\)", words), words
    assert identity_of(Flow(shift=2.0)) == "ldit.diffusion.flow.Flow(shift=2.0)"
    assert name_of(partial(network, None)) == "functools.partial"
    script = type("Mine", (), {"__module__": "__main__"})
    script_file = getattr(sys.modules["__main__"], "__file__", None)  # a worker of the tests has none
    assert name_of(script) == f"{Path(script_file or '__main__').stem}.Mine"


def test_a_network_may_return_more_than_its_output(tmp_path: Path) -> None:
    """For a loss of the user's that needs it."""

    class More(Convolution):
        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Any:
            out = super().forward(x, t, y)
            return Prediction(out, out.flatten(1).mean(1))

    class WithMore(Flow):
        def losses(self, predict: Any, x0: Tensor, t: Tensor, noise: Tensor) -> Any:
            extra = predict(self.q_sample(x0, t, noise), self.network_time(t)).aux
            return {**super().losses(predict, x0, t, noise), "extra": extra}

    ldit.train(ldit.Experiment(config=short(), objective=WithMore(), network=lambda _: More()), tmp_path / "run")
    assert '"extra"' in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_a_folder_is_no_module_that_a_file_would_hide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "spread").mkdir()
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "spread.py").write_text("from ldit.config.recipes.tiny import tiny_cpu as recipe")
    assert find_experiment("recipes/spread.py:recipe").config == diffusion_recipe("tiny-cpu")


class Fixed(Flow):
    """A process with one number of steps."""

    def own_grid(self, steps: str) -> Any:
        if steps != "7":
            raise ValueError("seven steps only")
        return super().own_grid(steps)


def test_a_process_that_fails_on_a_question_is_not_alike() -> None:
    assert not samples_alike(Fixed(), Flow()) and samples_alike(Flow(), Flow(shift=1.0))


class OwnBlock(Block):
    """Calls its parts in a way of its own."""


def test_a_block_of_the_users_is_not_packed() -> None:
    assert is_packable(Block(short().model)) and not is_packable(OwnBlock(short().model))


def test_a_network_of_another_output(tmp_path: Path) -> None:
    def build(config: Any) -> nn.Module:
        model = Convolution()
        model.conv, model.scale = nn.Conv2d(3, 5, 3, padding=1), nn.Linear(1, 5)
        return model

    with pytest.raises(ConfigError, match=r"network: its output must be .* got \(4, 5, 16, 16\)"):
        ldit.train(ldit.Experiment(config=short(), network=build), tmp_path / "run")
