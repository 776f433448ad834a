"""A cascade: a first stage of small images and a second one that enlarges them, from training to images."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folders import make_folder
from PIL import Image
from smallrun import SIDE, small
from textmodels import WIDTH, save_captioned, save_llama

import ldit
from ldit.cli.main import main
from ldit.codecs.latents import enlarged
from ldit.commands.train import train
from ldit.config.model import TextModelConfig
from ldit.config.run import RunConfig
from ldit.config.sections import TextConfig
from ldit.config.spec import CascadeConfig, ModelSpec
from ldit.data.loader import load_batch
from ldit.data.source import open_run_data
from ldit.errors import ConfigError, RequestError
from ldit.training.tasks.diffusion import open_diffusion

HALF = SIDE // 2


def second(data: Path, **changes: Any) -> RunConfig:
    """A run of a second stage, from half the side."""
    base = {"data.path": str(data), "model.cond_channels": 3, "train.batch_size": 4, "train.checkpoint_every": 2}
    return small({**base, "cascade.size": HALF, **changes})


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_two_stages(tmp_path: Path) -> None:
    data = make_folder(tmp_path / "data")
    first = small({"data.path": str(data), "data.image_size": HALF, "model.input_size": HALF, "train.steps": 2})
    train(first, tmp_path / "first")
    whole, part = tmp_path / "whole", tmp_path / "part"
    train(second(data, **{"train.steps": 5, "heldout.every": 5, "data.heldout": "0.3"}), whole)
    for steps in (2, 5):
        train(second(data, **{"train.steps": steps, "heldout.every": 5, "data.heldout": "0.3"}), part)
    assert len(losses(whole)) == 5 and losses(whole) == losses(part)
    # Both stages in one command are the first one's images, enlarged by the second.
    flags = ["--class-labels", "a", "b", "--steps", "3", "--solver", "ddim"]
    out = [*flags, "--image-save-path", str(tmp_path / "grid.png")]
    both = [*out, "--base", str(tmp_path / "first"), "--out", str(tmp_path / "both")]
    assert main(["sample", str(whole), *both]) == 0
    assert main(["sample", str(tmp_path / "first"), *out, "--out", str(tmp_path / "small")]) == 0
    files = sorted(map(str, (tmp_path / "small").iterdir()))
    assert main(["sample", str(whole), *out, "--from-image", *files, "--out", str(tmp_path / "large")]) == 0
    for one in sorted((tmp_path / "both").iterdir()):
        image = Image.open(one)
        assert image.size == (SIDE, SIDE)
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(tmp_path / "large" / one.name)))
    # In Python: one image for all, or one each; each image depends on its own small image alone.
    pipe = ldit.load(whole)
    assert pipe.spec.cascade == CascadeConfig(HALF) and ModelSpec.from_json(pipe.spec.to_json()) == pipe.spec
    images = [Image.open(file).convert("RGB") for file in files]
    more: dict[str, Any] = {"steps": 2, "guidance": 2.0, "output_type": "latent"}
    each = pipe.sample([0, 1], from_image=images, **more)
    alone = pipe.sample([1], from_image=images[1], seed=1, **more)
    torch.testing.assert_close(alone[0], each[1], rtol=1e-4, atol=1e-5)
    other = pipe.sample([1], from_image=images[0], seed=1, **more)
    assert (other[0] - each[1]).abs().max() > 1e-4
    wide = pipe.sample([0], from_image=images[0], width=2 * SIDE, height=SIDE, **more)
    assert wide.shape == (1, 3, SIDE, 2 * SIDE)


def test_what_the_network_is_given(tmp_path: Path) -> None:
    """The small image is the average over squares, with noise of (seed, position) in training, enlarged bilinearly."""
    config = second(make_folder(tmp_path / "data"), **{"cascade.noise": 0.5})
    data, _ = open_run_data(config.data, 3)
    task = open_diffusion(ldit.Experiment(config=config), data, torch.device("cpu"))
    seen: list[torch.Tensor] = []

    class Network(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            return torch.zeros(len(x), 6, SIDE, SIDE)

    batch = load_batch(data, range(64), [i % len(data) for i in range(64)], None)
    with torch.no_grad():
        for step in (task.evaluate, task.losses, task.losses):
            step(Network(), batch, torch.device("cpu"), torch.float32)
    mean = torch.nn.functional.avg_pool2d(batch.inputs, 2)
    assert seen[0].shape == (64, 6, SIDE, SIDE) and seen[0][:, 3:].equal(enlarged(mean, (SIDE, SIDE)))
    # The deviation is even between 0 and 0.5, so its square has the mean 0.5²/3; bilinear enlargement by two leaves
    # (10/16)² of the variance of noise: 0.0326, with a tenth of deviation over 64 images.
    noise = (seen[1] - seen[0])[:, 3:]
    assert 0.02 < noise.square().mean() < 0.046 and noise[0].std() != noise[1].std()
    assert seen[2][:, 3:].equal(seen[1][:, 3:])


def test_text_goes_with_it(tmp_path: Path) -> None:
    data, llama = save_captioned(tmp_path / "data", side=SIDE), save_llama(tmp_path / "llama")
    model = TextModelConfig(
        patch_size=2, in_channels=3, cond_channels=3, dim=16, n_layers=1, n_heads=2, multiple_of=16,
        max_seq_len=HALF * (HALF + 1), cap_feat_dim=WIDTH, rope="2d",
    )  # fmt: skip
    run = replace(second(data, **{"train.steps": 2}), model=model, text=TextConfig(str(llama), max_tokens=8))
    pipe = ldit.load(train(run, tmp_path / "run"))
    small_image = Image.new("RGB", (HALF, HALF), "red")
    assert pipe(["a red cat"], from_image=small_image, steps=2)[0].size == (SIDE, SIDE)


def test_what_cannot_be(tmp_path: Path) -> None:
    data = make_folder(tmp_path / "data")
    for changes, said in (
        ({"model.cond_channels": 0}, "model.cond_channels: must be 3 with cascade.size"),
        ({"cascade.size": 0}, "model.cond_channels: must be 0 with cascade.size 0"),
        ({"cascade.size": 3}, "cascade.size: must divide data.image_size"),
        ({"cascade.size": SIDE}, "cascade.size: must divide data.image_size"),
        ({"cascade.noise": -1.0}, "cascade.noise: must not be negative"),
        ({"data.buckets": True}, "cascade.size: does not go with data.buckets"),
    ):
        with pytest.raises(ConfigError, match=said):
            second(data, **changes).check()
    pipe = ldit.load(train(second(data, **{"train.steps": 1}), tmp_path / "run"))
    image = Image.new("RGB", (HALF, HALF))
    for keywords, said in (
        ({}, f"from_image: this model enlarges images of {HALF} pixels"),
        ({"from_image": [image, image]}, "2 images to enlarge for 1"),
        ({"from_image": "nowhere.png"}, "nowhere.png"),
    ):
        with pytest.raises(RequestError, match=said):
            pipe.sample([0], steps=1, **keywords)
    with pytest.raises(RequestError, match="this model enlarges no images"):
        ldit.load("emoji64-class-xs").sample([0], steps=1, from_image=image)
