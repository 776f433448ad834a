"""A folder of one's own images and one flag: classes, size, schedule and held-out part follow from them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eval.evaluation import Stub
from folders import make_folder, said
from PIL import Image

import ldit
from ldit.cli.main import dispatch
from ldit.config.recipes.registry import diffusion_recipe
from ldit.config.sections import TrainConfig
from ldit.data.formats.heldout import choose_share
from ldit.data.formats.image_folder import ImageFolder, LooseImages
from ldit.data.source import open_data
from ldit.errors import ConfigError, DataError
from ldit.eval import evaluate as evaluation
from ldit.training.optim import learning_rate


def photos(root: Path, count: int, turned: int = 0) -> Path:
    """JPEGs of many sizes, the first `turned` of them with an EXIF orientation."""
    root.mkdir(parents=True)
    random = np.random.RandomState(0)
    for i in range(count):
        exif = Image.Exif()
        exif[0x0112] = 6 if i < turned else 1
        pixels = random.randint(0, 256, (40 + 7 * i, 90 - 5 * i, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(root / f"IMG {i}.JPG", exif=exif)
    return root


@pytest.mark.parametrize("names", [("cat", "dog"), ()])
def test_one_flag_is_enough(tmp_path: Path, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of class folders and of loose images; resumed by the run alone, and sampled."""
    root, out = tmp_path / "photos", tmp_path / "run"
    for name in names or ("",):
        photos(root / name, 4)
    flags = ["--train.steps", "1", "--train.sample_every", "0", "--heldout.every", "1", "--train.batch_size", "2"]
    assert dispatch("train", ["finetune-small", "--data.path", str(root), "--out", str(out), *flags]) == 0
    config = json.loads((out / "config.json").read_text())
    assert (config["model"]["num_classes"], config["model"]["input_size"]) == (len(names), 64)
    step = json.loads((out / "checkpoints" / "step-00000001" / "config.json").read_text())
    assert tuple(step["conditioner"]["names"] or ()) == names
    kept = (out / "heldout.txt").read_text().split("\n")[:-1]
    assert len(kept) == max(len(names), 1) and all((root / name).is_file() for name in kept)
    assert dispatch("train", [str(out), "--train.steps", "2"]) == 0
    # The run's own share stands for a list that the folder does not have.
    monkeypatch.setattr(evaluation, "open_named", lambda name, weights, device, protocol=None: Stub())
    parts = {"heldout": len(kept), "train": 4 * max(len(names), 1) - len(kept)}
    for part, count in (pair for pair in parts.items() if pair[1] > 1):
        report = ldit.evaluate(out, f"{root}@{part}", num=4, extractor="stub", steps=1)
        assert report["num_reference"] == count
    labels = ["--class-labels", "dog"] if names else []
    file = str(tmp_path / "x.png")
    assert dispatch("sample", [str(out), *labels, "--steps", "1", "--image-save-path", file]) == 0


def test_shares_of_the_steps() -> None:
    """Warm-up and cool-down follow the steps; beside a number of steps, or above the whole, they are refused."""
    shares = TrainConfig(steps=200, warmup_share=0.05, cooldown_share=0.2)
    steps = TrainConfig(steps=200, warmup=10, cooldown=40)
    assert [learning_rate(shares, i) for i in range(1, 201)] == [learning_rate(steps, i) for i in range(1, 201)]
    for flags, words in (
        (["--train.warmup_share", "1.5"], "train.warmup_share: must be from 0 to 1, got 1.5"),
        (["--train.warmup_share", "0.9"], "train.steps: 2000 are fewer than train.warmup 1800"),
    ):
        with pytest.raises(ConfigError, match=words.replace(".", r"\.")):
            dispatch("train", ["finetune-small", "--data.path", "emoji64", "--out", "x", *flags])


def test_a_longer_run_does_not_warm_up_again(tmp_path: Path) -> None:
    """The number of warm-up steps is that of the run's begin; by the run alone and by the recipe again."""
    root, out = make_folder(tmp_path / "set"), tmp_path / "run"
    flags = ["--data.path", str(root), "--model.num_classes", "3", "--train.warmup_share", "0.5", "--out", str(out)]
    assert dispatch("train", ["tiny-cpu", *flags, "--train.steps", "2"]) == 0
    assert dispatch("train", [str(out), "--train.steps", "3"]) == 0
    assert dispatch("train", ["tiny-cpu", *flags, "--train.steps", "4"]) == 0
    assert json.loads((out / "config.json").read_text())["train"]["warmup"] == 1
    rates = [json.loads(line)["lr"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert set(rates) == {1e-3}


def test_a_share_is_held_out(tmp_path: Path) -> None:
    """Of each class, by the names alone: other images change nothing. One of two at least, never all."""
    root = make_folder(tmp_path / "set", each=20)
    train, heldout = open_data(str(root), 8, "0.1")
    assert heldout is not None and (len(train), len(heldout)) == (54, 6)
    kept = {heldout.where(i) for i in range(6)}
    assert [heldout.label(i) for i in range(6)] == [0, 0, 1, 1, 2, 2] and kept == set(
        choose_share(ImageFolder(root, 8), 0.1)
    )
    assert kept.isdisjoint(train.where(i) for i in range(54))
    make_folder(tmp_path / "set" / "more", names=("d",))
    (tmp_path / "set" / "more").rename(tmp_path / "set" / "z")
    again = open_data(str(root), 8, "0.1")[1]
    assert again is not None and kept < {again.where(i) for i in range(len(again))}
    pair = photos(tmp_path / "pair", 2)
    assert [len(part) for part in open_data(str(pair), 8, "0.01") if part is not None] == [1, 1]
    with pytest.raises(DataError, match="one image a class at most"):
        open_data(str(photos(tmp_path / "one", 1)), 8, "0.5")
    (pair / "0.5").write_text("IMG 0.JPG\n")  # a list of that name
    _, listed = open_data(str(pair), 8, "0.5")
    assert isinstance(listed, LooseImages) and listed.where(0) == "IMG 0.JPG"


def test_turned_images_are_warned_of(tmp_path: Path) -> None:
    root: Any = photos(tmp_path / "photos", 5, turned=3)
    flags = ["tiny-cpu", "--data.path", str(root), "--model.num_classes", "0", "--train.steps", "1", "--out"]
    for more, warned in (([], True), (["--data.exif"], False)):
        with said() as lines:
            assert dispatch("train", [*flags, str(tmp_path / f"run{warned}"), *more]) == 0
        words = "3 of 5 images looked at are turned by EXIF in viewers; --data.exif turns them here"
        assert (words in lines) == warned
    assert diffusion_recipe("finetune-small").data.exif
