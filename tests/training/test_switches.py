"""Switches of training: each against a short form of its own, and drawn by (seed, position) alone."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import after, started, tiny
from safetensors.torch import load_file
from torch import Tensor

import ldit
from ldit.checkpoint.run import step_folder
from ldit.config.run import RunConfig
from ldit.config.sections import ObjectiveConfig, OptimConfig, StageConfig
from ldit.config.spec import FlowConfig
from ldit.data.batch import Batch
from ldit.errors import ConfigError
from ldit.rng import generator
from ldit.training.tasks.augment import augmented_with_labels
from ldit.training.tasks.diffusion import DiffusionTask
from ldit.training.tasks.inputs import training_noise

CPU = torch.device("cpu")
TURNED = {"rope": "2d"}


def flow(model: dict[str, Any] | None = None, objective: dict[str, Any] | None = None, **run: Any) -> RunConfig:
    config = tiny(batch_size=4, lr=2e-3)
    config = replace(
        config,
        process=FlowConfig(),
        model=replace(config.model, learn_sigma=False, **(model or {})),
        objective=ObjectiveConfig(**(objective or {})),
        **run,
    )
    config.check()
    return config


def moved(config: RunConfig) -> tuple[Any, DiffusionTask, Batch]:
    """A run whose network sees its inputs (fresh gates are zero), and its first batch."""
    state, task, loader = started(config)
    (batch,) = loader.from_step(0, 1)
    with torch.no_grad():
        for i, p in enumerate(state.weights.masters):
            p.add_(torch.randn(p.shape, generator=generator(0, "moved", 0, i)) * 0.05)
    state.weights.sync_to_model()
    return state, task, batch


SWITCHES: dict[str, RunConfig] = {
    "class tokens": flow({"class_tokens": 3}),
    "shared adaLN": flow({"shared_adaln": True}),
    "value residual": flow({"value_residual": True}),
    "two levels": flow({"fine_layers": 1, "patch_size": 2}),
    "second head": flow({"mid_layer": 1}),
    "augment": flow({"augment_labels": True}, {"augment": 0.5}),
    "dropout": flow({}, {"dropout": 0.2}),
    "route": flow({"n_layers": 3}, {"route": 0.5, "route_blocks": (2, 2)}),
    "nearest": flow({}, {"nearest_of": 3}),
    "min-SNR": flow({}, {"min_snr": 5.0}),
    "direction": flow({}, {"direction": 0.5}),
    "stages": flow({"rope": "2d"}, stages=(StageConfig(8, 2, 0.5),)),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_a_sample_is_its_own_and_the_loss_falls(name: str) -> None:
    """Alone or in a batch, a sample has the same loss; the plain run has another; and it can be trained."""
    config = SWITCHES[name]
    state, task, batch = moved(config)
    with torch.no_grad():
        whole = task.losses(state.weights.model, batch, CPU, torch.float32)["loss"]
        parts = [task.losses(state.weights.model, micro, CPU, torch.float32)["loss"] for micro in batch.micro(1)]
    torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-4, atol=1e-6)
    _, outcomes = after(config, 25)
    first, last = (sum(o.values["loss"] for o in part) for part in (outcomes[:5], outcomes[-5:]))
    assert last < first
    if not name.startswith(("class", "shared", "value", "two")):  # those are other networks
        plain = replace(config, objective=ObjectiveConfig(), stages=(), model=replace(config.model, mid_layer=0))
        state, task, batch = moved(plain)
        with torch.no_grad():
            other = task.losses(state.weights.model, batch, CPU, torch.float32)["loss"]
        assert (whole - other).abs().max() > 1e-3


def test_the_second_head_adds_its_own_loss() -> None:
    state, task, batch = moved(SWITCHES["second head"])
    with torch.no_grad():
        losses = task.losses(state.weights.model, batch, CPU, torch.float32)
    x0 = batch.inputs
    t = task.draw_times(batch)
    noise = training_noise(x0, batch.positions, task.seed, "noise")
    with torch.no_grad():
        x_t = task.process.q_sample(x0, t, noise)
        out, mid = state.weights.model(x_t, task.process.network_time(t), task.draw_labels(batch), mid=True)
    own, second = ((value - (noise - x0)).square().mean((1, 2, 3)) for value in (out, mid))
    torch.testing.assert_close(losses["mid_loss"], second)
    torch.testing.assert_close(losses["loss"], own + 0.5 * second)


def test_the_nearest_of_some_noises() -> None:
    """Each sample has the nearest of its own draws; one draw is the plain noise."""
    x0 = torch.randn(6, 3, 4, 4)
    positions = (0, 5, 9, 2, 100, 7)
    found = training_noise(x0, positions, 3, "noise", 4)
    for row, position in enumerate(positions):
        draws = torch.randn((4, 3, 4, 4), generator=generator(3, "noise", 0, position))
        distances = [(draw - x0[row]).norm().item() for draw in draws]
        assert torch.equal(found[row], draws[min(range(4), key=lambda k: distances[k])])
    plain = training_noise(x0, positions, 3, "noise")
    assert torch.equal(plain[1], torch.randn((3, 4, 4), generator=generator(3, "noise", 0, 5)))


def test_augmentation_tells_what_it_did() -> None:
    """The image that was made is the one that the labels describe; without any it is untouched."""
    source = torch.Generator().manual_seed(0)
    images = torch.nn.functional.interpolate(torch.randn(256, 3, 4, 4, generator=source), 32, mode="bicubic")
    made, labels = augmented_with_labels(images, range(256), 0, 0.15)
    untouched = labels.abs().sum(1) == 0
    assert 60 < untouched.sum() < 140  # 0.85^6 of 256 are 97
    assert torch.equal(made[untouched], images[untouched])
    one = {name: [i for i in range(256) if labels[i].nonzero().flatten().tolist() == places]
           for name, places in (("mirrored", [0]), ("flipped", [1]), ("scaled", [2]), ("shifted", [7, 8]))}  # fmt: skip
    for i in one["mirrored"]:
        torch.testing.assert_close(made[i], images[i].flip(-1), atol=1e-4, rtol=0)
    for i in one["flipped"]:
        torch.testing.assert_close(made[i], images[i].flip(-2), atol=1e-4, rtol=0)
    assert one["mirrored"] and one["flipped"] and one["scaled"] and one["shifted"]
    # A place q of the result shows place q / 2^(0.2 n) of the image, or the place a shift of n/8 of the side before.
    side = (torch.arange(32) + 0.5) / 16 - 1
    for i in (*one["scaled"], *one["shifted"]):
        scale = 2 ** (0.2 * labels[i, 2].item())
        across, down = (2 * labels[i, place].item() / 8 for place in (7, 8))
        for row, column in ((9, 14), (16, 16), (20, 12)):
            y, x = side[row].item() / scale - down, side[column].item() / scale - across
            if max(abs(x), abs(y)) < 0.95:
                place = torch.tensor([[[[x, y]]]])
                expected = torch.nn.functional.grid_sample(images[i : i + 1], place, align_corners=False)[0, :, 0, 0]
                torch.testing.assert_close(made[i, :, row, column], expected, atol=1e-4, rtol=0)


def test_a_rotation_and_its_label() -> None:
    """What lies to the right of the centre is turned about it by the angle of the label."""
    rows, columns = torch.meshgrid(torch.arange(65) - 32.0, torch.arange(65) - 32.0, indexing="ij")
    blob = torch.exp(-((columns - 12).square() + rows.square()) / 8)
    images = blob.expand(400, 3, -1, -1)
    made, labels = augmented_with_labels(images, range(400), 1, 0.15)
    turned = [i for i in range(400) if labels[i].nonzero().flatten().tolist() == [3, 4]]
    assert len(turned) > 10
    for i in turned:
        x, y = ((made[i, 0] * axis).sum() / made[i, 0].sum() for axis in (columns, rows))
        assert (x / 12 - labels[i, 3] - 1).abs() < 0.01 and (y / 12 - labels[i, 4]).abs() < 0.01


def test_stages_are_small_images_first() -> None:
    """Means over squares, with the shift of the stage; and the full size after it."""
    config = SWITCHES["stages"]
    _, task, loader = started(config)
    seen = []

    class Watched(torch.nn.Module):
        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            seen.append((tuple(x.shape), t))
            return x * 0

    for batch in loader.from_step(0, 3):
        with torch.no_grad():
            task.losses(Watched(), batch, CPU, torch.float32)
        u = torch.cat([torch.randn(1, generator=generator(0, "time", 0, p)) for p in batch.positions]).sigmoid()
        shifted = 0.5 * u / (1 - 0.5 * u) if batch.positions[0] < 8 else u
        torch.testing.assert_close(seen[-1][1], 1000 * shifted)
    assert [shape for shape, _ in seen] == [(4, 3, 8, 8), (4, 3, 8, 8), (4, 3, 16, 16)]
    (batch,) = loader.from_step(0, 1)
    small = task.inputs(batch, CPU, 8)
    torch.testing.assert_close(small[1, 2, 3, 5], batch.inputs[1, 2, 6:8, 10:12].mean())


def test_a_rollback_does_not_shorten_a_stage() -> None:
    """It skips data, and so positions; the step decides."""
    _, task, loader = started(SWITCHES["stages"])
    batches = loader.from_step(0, 3, offset=400)
    assert [task.stage_of(batch)[0] is not None for batch in batches] == [True, True, False]


@pytest.mark.parametrize("name", ["stages", "muon", "everything"])
def test_a_run_that_was_stopped_goes_on_with_the_same_losses(name: str, tmp_path: Path) -> None:
    """In the middle of a stage, between two full steps of Muon, and with every per-sample draw: bit for bit."""
    config = SWITCHES["stages"]
    if name == "muon":
        config = replace(flow(), optim=OptimConfig("muon", chunked=True, every=2))
    if name == "everything":
        objective = {"augment": 0.3, "dropout": 0.2, "nearest_of": 2, "direction": 0.2, "min_snr": 5.0}
        config = flow({"augment_labels": True, "class_tokens": 2, "mid_layer": 1, "shared_adaln": True}, objective)
    train = replace(config.train, steps=5, log_every=1, sample_every=0, checkpoint_every=5)
    config = replace(config, train=train, heldout=replace(config.heldout, every=0))
    stopped = replace(config, train=replace(train, steps=3, checkpoint_every=1))
    ldit.train(config, tmp_path / "whole")
    ldit.train(stopped, tmp_path / "run")
    for step in (3, 2):  # what was saved after step 1 is what it goes on from
        shutil.rmtree(step_folder(tmp_path / "run", step))
    ldit.train(config, tmp_path / "run")
    read = [[json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
            for run in ("whole", "run")]  # fmt: skip
    assert [row["loss"] for row in read[0]] == [row["loss"] for row in read[1]] and len(read[0]) == 5
    ends = [load_file(step_folder(tmp_path / run, 5) / "model.safetensors") for run in ("whole", "run")]
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


@pytest.mark.parametrize(
    ("model", "objective", "run", "named"),
    [
        ({}, {"augment": 0.1}, {}, r"objective\.augment: goes with model\.augment_labels"),
        ({"augment_labels": True}, {}, {}, r"objective\.augment: goes with model\.augment_labels"),
        ({}, {"route_blocks": (1, 2)}, {}, r"objective\.route_blocks: has no effect without objective\.route"),
        ({}, {"mid_weight": -1.0}, {}, r"objective\.mid_weight: must not be negative"),
        ({}, {}, {"stages": (StageConfig(8, 2),)}, r"stages: need model\.rope 2d"),
        ({}, {}, {"optim": OptimConfig(chunked=True)}, r"optim\.chunked and optim\.precision: go with .* muon"),
        ({}, {}, {"optim": OptimConfig("muon", every=2)}, r"optim\.every: goes with optim\.chunked"),
        ({}, {"dropout": 1.0}, {}, r"objective\.dropout"),
        ({}, {"route": 0.5}, {}, r"objective\.route_blocks: two numbers from 1 to 2"),
        ({}, {"route": 0.5, "route_blocks": (2, 3)}, {}, r"objective\.route_blocks"),
        ({"value_residual": True}, {"route": 0.5, "route_blocks": (1, 2)}, {}, r"objective\.route: goes with neither"),
        ({"mid_layer": 2}, {}, {}, r"model\.mid_layer: must be 0 to 1"),
        ({"fine_layers": 2}, {}, {}, r"model\.fine_layers: must be 0 to 1"),
        ({"fine_layers": 1, "patch_size": 16}, {}, {}, r"model\.fine_layers: input_size 16 is no multiple of 32"),
        ({}, {"nearest_of": 0}, {}, r"objective\.nearest_of"),
        ({}, {"min_snr": -1.0}, {}, r"objective\.min_snr"),
        (
            TURNED,
            {},
            {"stages": (StageConfig(6, 2),)},
            r"stages: size must be a multiple of 4 that divides .* 16, got 6",
        ),
        (TURNED, {}, {"stages": (StageConfig(8, 50),)}, r"stages: they take all of train\.steps 50"),
        (TURNED, {}, {"stages": (StageConfig(8, 0),)}, r"stages: steps"),
    ],
)
def test_refused(model: dict[str, Any], objective: dict[str, Any], run: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        flow(model, objective, **run)


def test_a_fresh_network_has_no_direction() -> None:
    """Its velocity is zero: the loss of the direction must not give it a gradient without bound."""
    _, (outcome,) = after(flow({}, {"direction": 0.5}), 1)
    assert 0.1 < outcome.values["grad_norm"] < 10
