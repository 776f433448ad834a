"""A classifier's run: it learns, goes on bit by bit, says what it is, and is refused where a model is wanted."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from classifiers import NAMES, SIDE, classifier_run, make_stripes
from folders import make_folder, said
from smallrun import changed

from ldit.checkpoint.classifier import holds_classifier, open_classifier_step
from ldit.cli.main import main
from ldit.cli.train import parse_arguments
from ldit.commands.convert import convert
from ldit.commands.train import run as train
from ldit.config.classifier import ClassifierModelConfig, ClassifierRun, ClassifierSpec
from ldit.config.experiment import Experiment
from ldit.config.kinds import run_from_json, spec_from_json
from ldit.config.recipes.registry import recipe
from ldit.data.source import open_data
from ldit.errors import ConfigError, DataError, SourceError
from ldit.storage import manifest
from ldit.training.resume import RESUMABLE, RESUMABLE_SECTIONS
from ldit.training.tasks.classifier import open_classifier

LAST = "checkpoints/step-00000004"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data` and a finished run `run` over it."""
    base = tmp_path_factory.mktemp("classifier")
    make_stripes(base / "data")
    assert train(classifier_run(base / "data"), base / "run") == 0
    return base


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main(list(map(str, arguments))) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    return line


def test_it_learns(place: Path, tmp_path: Path) -> None:
    """Stripes of images that it never saw. Chance names 4 of 12, and ten or more once in two thousand times."""
    changes = {"train.steps": 60, "train.lr": 1e-2, "train.log_every": 20, "train.checkpoint_every": 0,
               "heldout.every": 60}  # fmt: skip
    assert train(classifier_run(place / "data", changes), tmp_path / "run") == 0
    found = records(tmp_path / "run")
    assert found[-1]["accuracy"] >= 10 / 12 and found[-1]["cross_entropy"] < 0.5
    assert {"loss", "train_accuracy", "grad_norm"} <= set(found[0]) and "accuracy" not in found[0]


def test_a_step_says_all_that_its_weights_need(place: Path) -> None:
    stated = json.loads((place / "run" / LAST / "config.json").read_text())
    assert stated == {
        "format": 1,
        "model": {"kind": "classifier", "widths": [8, 16], "norm_num_groups": 4},
        "image_size": SIDE,
        "names": list(NAMES),
        "training": {"step": 4, "images": 32},
    }
    spec = ClassifierSpec.from_json(stated)
    assert dict(spec) == stated and spec_from_json(stated) == spec and spec.class_names == NAMES
    assert run_from_json(json.loads((place / "run/config.json").read_text())) == classifier_run(place / "data")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra": 1}, "unknown key 'extra'"),
        ({"format": 2}, "format: expected 1, got 2"),
        ({"names": ["a"]}, "names: a classifier needs two"),
        ({"image_size": 8}, "image_size: "),
        ({"model": {"kind": "class"}}, "not a classifier of ours"),
    ],
)
def test_a_step_that_says_something_else_is_named(changes: dict[str, Any], message: str) -> None:
    spec = ClassifierSpec(ClassifierModelConfig(), SIDE, NAMES)
    with pytest.raises(ConfigError, match=message) as error:
        ClassifierSpec.from_json({**spec, **changes}, "somewhere/config.json")
    assert str(error.value).startswith("somewhere/config.json: ")


def test_it_resumes_to_the_same_bits(place: Path, tmp_path: Path) -> None:
    config = classifier_run(place / "data")
    assert train(changed(config, {"train.steps": 2}), tmp_path / "run") == 0
    torch.manual_seed(7)  # what a global generator has come to does not matter
    assert train(config, tmp_path / "run") == 0
    for name in ("config.json", "model.safetensors", "ema.safetensors", "state/optimizer.safetensors"):
        assert (tmp_path / "run" / LAST / name).read_bytes() == (place / "run" / LAST / name).read_bytes(), name
    ours, theirs = records(tmp_path / "run"), records(place / "run")
    for key in ("loss", "train_accuracy", "grad_norm"):
        assert [row[key] for row in ours] == [row[key] for row in theirs]


def leaves(value: Any, where: str) -> set[str]:
    if not isinstance(value, dict):
        return {where}
    return {leaf for key, inner in value.items() for leaf in leaves(inner, f"{where}.{key}" if where else key)}


REFUSED: dict[str, Any] = {
    "model.widths": (8, 8), "model.norm_num_groups": 2, "objective.label_smoothing": 0.2, "objective.dropout": 0.1,
    "objective.augment": False, "objective.balanced": False, "data.image_size": 40, "data.flip": False,
}  # fmt: skip


@pytest.mark.parametrize("key", REFUSED)
def test_another_run_is_refused_with_the_difference(key: str, place: Path) -> None:
    with pytest.raises(ConfigError, match=rf"another run, choose a new --out: {key} .* -> "):
        train(classifier_run(place / "data", {key: REFUSED[key], "train.steps": 6}), place / "run")


def test_every_key_was_thought_of(place: Path) -> None:
    """Sections that all runs share are judged in test_resume_changes.py; no key of this kind's own may change."""
    own = leaves(
        {name: section for name, section in classifier_run(place).to_json().items() if name in ("model", "objective")},
        "",
    )
    assert own - {"model.kind"} <= set(REFUSED)
    assert not own & RESUMABLE and not {"model", "objective"} & set(RESUMABLE_SECTIONS)


def test_a_run_of_another_kind_is_called_so(place: Path) -> None:
    config = changed(recipe("emoji64-vae"), {"data.path": str(place / "data")})  # type: ignore[type-var, arg-type]
    with pytest.raises(ConfigError, match="it trains a classifier, this one an autoencoder"):
        train(config, place / "run")


def test_data_that_shows_no_classes_is_refused(place: Path, tmp_path: Path) -> None:
    """Before anything of a run is made."""
    loose = make_folder(tmp_path / "set", ("a",), side=SIDE)
    with pytest.raises(DataError, match="holds only the class 'a', a classifier needs two or more classes"):
        train(classifier_run(loose), tmp_path / "run")
    with pytest.raises(DataError, match="holds images without classes, a classifier needs two or more classes"):
        train(classifier_run(loose / "a"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_latents_are_refused() -> None:
    class Latents:
        root, names, cache = "cache", NAMES, object()

    with pytest.raises(DataError, match="cache holds latents, a classifier is trained on images"):
        open_classifier(Experiment(config=classifier_run(Path("cache"))), Latents(), torch.device("cpu"))  # type: ignore[arg-type]


def test_weights_are_those_of_the_training_images(tmp_path: Path) -> None:
    """Of 12, 12 and 2 images: 26 / (3 n)."""
    root = make_stripes(tmp_path / "data", heldout=0)
    for index in range(2, 12):
        (root / "noise" / f"{index:02d}.png").unlink()
    data, _ = open_data(str(root), SIDE, "")
    for balanced, expected in ((True, [26 / 36, 26 / 36, 26 / 6]), (False, [1.0] * 3)):
        config = classifier_run(root, {"objective.balanced": balanced, "data.heldout": ""})
        task = open_classifier(Experiment(config=config), data, torch.device("cpu"))
        assert task.weights.tolist() == pytest.approx(expected)


def test_a_run_without_held_out_images_says_so(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", side=SIDE)
    with said() as lines:
        assert train(classifier_run(root, {"train.steps": 1, "train.batch_size": 4}), tmp_path / "run") == 0
    assert any("no held-out images: no accuracy is measured" in line for line in lines)
    assert "accuracy" not in records(tmp_path / "run")[0]


def test_info_says_what_it_is(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def told(*arguments: object) -> dict[str, Any]:
        capsys.readouterr()
        assert main(["info", *map(str, arguments), "--json"]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    found = told(place / "run")
    assert found == told(place / "run" / LAST)
    wanted = {"kind": "classifier", "path": str(place / "run" / LAST), "image_size": SIDE, "features": 16,
              "classes": 3, "step": 4, "weights": ["raw", "ema"], "dtype": "fp32"}  # fmt: skip
    assert {key: found[key] for key in wanted} == wanted
    assert found["config"]["names"] == list(NAMES) and len(found["fingerprint"]) == 64
    assert told(place / "run", "--verify")["verified"] is True
    assert "heads are those of a DiT .pt" in refused(capsys, "info", place / "run", "--heads", 4)


def test_it_is_no_model(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for source in (place / "run", place / "run" / LAST):
        assert holds_classifier(source)
        line = refused(capsys, "sample", "--ckpt", source, "--image-save-path", tmp_path / "x.png")
        assert f"{source} is a classifier, which makes no images" in line
        with pytest.raises(SourceError, match="is a classifier, which makes no images"):
            convert(source, tmp_path / "out", to="original")
    assert "has no snapshots" in refused(capsys, "ema", place / "run", tmp_path / "out", "--sigma-rel", 0.1)
    assert not holds_classifier(place / "data")
    assert not (tmp_path / "out").exists()


def test_damage_falls_back_to_the_step_before(place: Path, tmp_path: Path) -> None:
    run = shutil.copytree(place / "run", tmp_path / "run")
    file = run / LAST / "ema.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with said() as lines:
        assert open_classifier_step(run).path.name == "step-00000002"
    assert any(line.startswith("step 4 is skipped") for line in lines)
    with pytest.raises(SourceError, match=r"ema\.safetensors"):
        open_classifier_step(run / LAST)
    (run / "checkpoints/step-00000002" / manifest.NAME).unlink()
    shutil.rmtree(run / "checkpoints/step-00000002/state")  # an export, elsewhere; in a run it is no committed step
    with pytest.raises(SourceError, match="has no valid step"):
        open_classifier_step(run)


def test_the_recipe_and_its_flags(place: Path) -> None:
    flags = "--data.path x --out y --model.widths 8 16 --objective.augment false"
    config = parse_arguments(["extractor-small", *flags.split()]).config
    assert isinstance(config, ClassifierRun) and config.data.path == "x"
    assert config.model.widths == (8, 16) and not config.objective.augment and config.objective.balanced
