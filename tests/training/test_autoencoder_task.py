"""Autoencoders: losses by hand, training, resume, and the way from a run to a codec."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import make_folder
from PIL import Image
from smallrun import ALONE

from ldit.checkpoint.autoencoder import holds_autoencoder, open_autoencoder
from ldit.cli.main import main
from ldit.commands.convert import convert
from ldit.commands.train import run as train
from ldit.config.autoencoder import (
    AutoencoderModelConfig,
    AutoencoderObjectiveConfig,
    AutoencoderRun,
    AutoencoderSpec,
    LatentStatistics,
)
from ldit.config.kinds import run_from_json
from ldit.config.sections import DataConfig, EMAConfig, HeldoutConfig, ParallelConfig, TrainConfig
from ldit.data.batch import Batch
from ldit.errors import ConfigError, DataError, SourceError
from ldit.rng import normal
from ldit.training.step import fill_fresh, new_state, train_step
from ldit.training.tasks.autoencoder import AutoencoderTask

CPU = torch.device("cpu")
MODEL = AutoencoderModelConfig(2, (8, 16), 1, 4, mid_block_attention=False)


def run(**parts) -> AutoencoderRun:
    base = AutoencoderRun(
        model=MODEL,
        data=DataConfig("emoji64", 16, max_per_class=10, workers=0),
        train=TrainConfig(steps=4, batch_size=8, lr=2e-3, log_every=1, checkpoint_every=2, attention_every=0),
        ema=EMAConfig(0.9),
        heldout=HeldoutConfig(every=2, num=16),
    )
    return replace(base, **parts)


def started(config: AutoencoderRun):
    task = AutoencoderTask(config, AutoencoderSpec(config.model))
    state = new_state(config, task, ALONE)
    fill_fresh(state, task)
    return state, task


def batch(count: int = 4) -> Batch:
    images = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return Batch(images, torch.zeros(count, dtype=torch.long), tuple(range(10, 10 + count)))


def test_losses_are_those_of_the_definition() -> None:
    """L1 of the image drawn with the position's own noise, and the divergence of a diagonal Gaussian from a standard
    normal, ½ Σ (μ² + σ² - 1 - ln σ²), over the number of pixel values; in float64 from the network's own moments."""
    config = run(objective=AutoencoderObjectiveConfig(kl_weight=0.25))
    state, task = started(config)
    model, data = state.weights.model, batch()
    found = task.losses(model, data, CPU, torch.float32)
    with torch.no_grad():
        mean, logvar = model.moments(data.inputs)
        noise = torch.stack([normal((2, 8, 8), 0, "posterior", 0, position) for position in data.positions])
        pictures = model.images(mean + (logvar / 2).exp() * noise)
    mu, lv, x, y = (t.double().numpy() for t in (mean, logvar, data.inputs, pictures))
    for row in range(4):
        l1 = np.abs(x[row] - y[row]).mean()
        kl = 0.5 * (mu[row] ** 2 + np.exp(lv[row]) - 1 - lv[row]).sum() / (3 * 16 * 16)
        assert found["l1"][row].item() == pytest.approx(l1, rel=1e-5)
        assert found["kl"][row].item() == pytest.approx(kl, rel=1e-5)
        assert found["loss"][row].item() == pytest.approx(l1 + 0.25 * kl, rel=1e-5)


def test_held_out_values_are_those_of_the_mean() -> None:
    state, task = started(run())
    data = batch()
    with torch.no_grad():
        found = task.evaluate(state.weights.model, data, CPU, torch.float32)
        mean, logvar = state.weights.model.moments(data.inputs)
        pictures = state.weights.model.images(mean).clamp(-1, 1)
    for row in range(4):
        mse = ((pictures[row] - data.inputs[row]).double() ** 2).mean().item()
        assert found["psnr"][row].item() == pytest.approx(10 * np.log10(4 / mse), rel=1e-5)  # peak to peak is 2
    noise = torch.stack([normal((2, 8, 8), 0, "posterior", 0, position) for position in data.positions])
    drawn = (mean + (logvar / 2).exp() * noise).double()
    task.conclude({name: values.double().mean().item() for name, values in found.items()})
    assert task.spec.latents is not None
    assert task.spec.latents.mean == pytest.approx(drawn.mean().item(), abs=2e-6)
    assert task.spec.latents.std == pytest.approx(drawn.std(correction=0).item(), rel=1e-5)


def test_fresh_weights_depend_on_the_name_alone() -> None:
    task = AutoencoderTask(run(), AutoencoderSpec(MODEL))
    shapes = {name: tuple(p.shape) for name, p in task.network().named_parameters()}
    values = {name: task.initial(name, shape) for name, shape in shapes.items()}
    for name, value in values.items():
        assert torch.equal(value, task.initial(name, shapes[name]))
        if value.dim() == 1:
            assert (value == (1 if "norm" in name and name.endswith("weight") else 0)).all(), name
        else:
            bound = torch.Size(shapes[name][1:]).numel() ** -0.5
            assert value.abs().max() <= bound and value.abs().max() > 0.8 * bound, name


def test_training_lowers_the_loss() -> None:
    config = run()
    state, task = started(config)
    losses = [train_step(state, task, batch(8)).values["l1"] for _ in range(30)]
    assert losses[-1] < 0.6 * losses[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("autoencoder") / "run"
    assert train(replace(run(), train=replace(run().train, sample_every=4)), out) == 0
    return out


def test_a_run_of_an_autoencoder(finished: Path) -> None:
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    assert {"loss", "l1", "kl", "grad_norm"} <= set(records[0]) and "loss_q1" not in records[0]
    assert "psnr" in records[1] and "psnr" in records[3] and "psnr" not in records[2]
    assert (finished / "samples/step-00000004.png").stat().st_size > 1000
    spec = AutoencoderSpec.from_json(json.loads((finished / "checkpoints/step-00000004/config.json").read_text()))
    assert spec.latents is not None and spec.latents.std > 0 and spec.training == {"step": 4, "images": 32}
    assert run_from_json(json.loads((finished / "config.json").read_text())).model == MODEL


def test_it_resumes_to_the_same_bits(finished: Path, tmp_path: Path) -> None:
    config = replace(run(), train=replace(run().train, sample_every=4))
    assert train(replace(config, train=replace(config.train, steps=2)), tmp_path / "run") == 0
    assert train(config, tmp_path / "run") == 0
    for name in ("config.json", "model.safetensors", "ema.safetensors", "state/optimizer.safetensors"):
        ours, theirs = (p / "checkpoints/step-00000004" / name for p in (tmp_path / "run", finished))
        assert ours.read_bytes() == theirs.read_bytes(), name


def test_statistics_outlive_a_stop(tmp_path: Path) -> None:
    """A commit between a resume and the next measurement says what the undisturbed run's does."""
    config = run(heldout=HeldoutConfig(every=4, num=16), train=replace(run().train, steps=8, keep=0, sample_every=0))
    assert train(config, tmp_path / "whole") == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    for step in ("step-00000006", "step-00000008"):
        shutil.rmtree(tmp_path / "run/checkpoints" / step)
    assert train(config, tmp_path / "run") == 0
    for step in ("step-00000006", "step-00000008"):
        ours, theirs = (tmp_path / name / "checkpoints" / step for name in ("run", "whole"))
        assert b"latents" in theirs.joinpath("config.json").read_bytes()
        assert (ours / "config.json").read_bytes() == (theirs / "config.json").read_bytes()


def test_bad_images_are_left_out_and_recorded(tmp_path: Path) -> None:
    """Of those that are measured and those that are shown, each once, held-out ones marked."""
    data = make_folder(tmp_path / "data", side=16)
    for name in ("a/0.png", "b/1.png"):
        (data / name).write_bytes(b"no picture")
    (data / "heldout.txt").write_text("a/0.png\na/1.png\n")
    config = run(
        data=DataConfig(str(data), 16, workers=0, bad="skip"),
        train=replace(run().train, steps=6, batch_size=4, sample_every=3),
        heldout=HeldoutConfig(every=2, num=2),
    )
    assert train(config, tmp_path / "run") == 0
    lines = [json.loads(line) for line in (tmp_path / "run/skipped.jsonl").read_text().splitlines()]
    assert sorted(line["where"] for line in lines) == ["b/1.png", "held-out a/0.png"]
    size = Image.open(tmp_path / "run/samples/step-00000006.png").size
    (data / "heldout.txt").write_text("a/1.png\n")
    alone = replace(config, train=replace(config.train, steps=1, sample_every=1))
    assert train(alone, tmp_path / "alone") == 0
    assert Image.open(tmp_path / "alone/samples/step-00000001.png").size == size  # the same one pair
    (data / "heldout.txt").write_text("a/0.png\na/1.png\n")
    shutil.copyfile(data / "b/0.png", data / "b/1.png")
    assert train(replace(alone, heldout=HeldoutConfig()), tmp_path / "shown") == 0  # and nothing measured
    (line,) = (tmp_path / "shown/skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["where"] == "held-out a/0.png"
    with pytest.raises(DataError, match=r"a/0\.png"):
        train(replace(config, data=replace(config.data, bad="stop"), heldout=HeldoutConfig()), tmp_path / "other")


def test_heads_are_no_business_of_an_autoencoder(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"heads are those of a DiT \.pt"):
        convert(finished, tmp_path / "vae", to="diffusers", heads=3)
    assert not (tmp_path / "vae").exists()


def test_a_run_becomes_a_codec(finished: Path, tmp_path: Path) -> None:
    """The folder opens with diffusers' own class, its weights are the average's, its scale brings latents to 1."""
    from diffusers import AutoencoderKL

    out = convert(finished, tmp_path / "vae", to="diffusers")
    theirs = AutoencoderKL.from_pretrained(out)
    source = open_autoencoder(finished)
    ema = dict(source.tensors())
    state = theirs.state_dict()
    assert state.keys() == ema.keys() and all(torch.equal(state[name], ema[name]) for name in ema)
    assert source.spec.latents is not None
    assert theirs.config.scaling_factor == pytest.approx(1 / source.spec.latents.std, rel=1e-5)
    assert theirs.config.shift_factor == source.spec.latents.mean
    half = convert(finished / "checkpoints/step-00000004", tmp_path / "half", to="diffusers", dtype="bf16")
    small, large = ((p / "diffusion_pytorch_model.safetensors").stat().st_size for p in (half, out))
    assert small < 0.6 * large


def test_a_codec_without_statistics_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("ldit").propagate = True
    config = run(heldout=HeldoutConfig(every=0, num=0), train=replace(run().train, steps=1, sample_every=0))
    assert train(config, tmp_path / "run") == 0
    out = convert(tmp_path / "run", tmp_path / "vae", to="diffusers")
    assert "scaling_factor" not in json.loads((out / "config.json").read_text())
    assert "written without scale and shift" in caplog.text


def test_an_autoencoder_is_no_model(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert holds_autoencoder(finished) and holds_autoencoder(finished / "checkpoints/step-00000004")
    for source in (finished, finished / "checkpoints/step-00000004"):
        assert main(["sample", "--ckpt", str(source), "--image-save-path", str(tmp_path / "x.png")]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "--to diffusers makes a codec of it" in said
    with pytest.raises(SourceError, match="--to diffusers, not original"):
        convert(finished, tmp_path / "original", to="original")


def test_damage_falls_back_to_the_step_before(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    file = copy / "checkpoints/step-00000004/ema.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert open_autoencoder(copy).path.name == "step-00000002"
    with pytest.raises(SourceError, match="damaged"):
        open_autoencoder(copy / "checkpoints/step-00000004")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"data": DataConfig("emoji64", 15)}, "data.image_size: 15 is not a multiple"),
        ({"parallel": ParallelConfig(tp=2)}, "parallel.tp"),
        ({"parallel": ParallelConfig(compile=True)}, "parallel.compile"),
        ({"objective": AutoencoderObjectiveConfig(-1.0)}, "objective.kl_weight"),
        ({"data": DataConfig("emoji64", 16, background=(0, 0, 256))}, "data.background"),
        ({"train": replace(run().train, attention_every=5)}, "train.attention_every: .*got 5"),
        ({"train": replace(run().train, init_ema=False)}, "train.init_ema: .*got False"),
        ({"data": DataConfig("emoji64", 16, codec_precision="bf16")}, "data.codec_precision: .*got 'bf16'"),
        ({"ema": EMAConfig(0.9, power=(0.05, 0.1), snapshot_every=2)}, "ema.power: `ldit ema`"),
    ],
)
def test_what_cannot_work_is_named(parts: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(**parts).check()


@pytest.mark.parametrize("changes", [{"block_out_channels": ()}, {"block_out_channels": (7,)}, {"latent_channels": 0}])
def test_networks_that_cannot_be_built(changes: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        replace(MODEL, **changes)


def test_a_run_without_measurements(tmp_path: Path) -> None:
    assert train(run(heldout=HeldoutConfig(every=2, num=0)), tmp_path / "run") == 0
    assert open_autoencoder(tmp_path / "run").spec.latents is None


def test_statistics_travel() -> None:
    spec = AutoencoderSpec(MODEL, LatentStatistics(0.25, 2.0), {"step": 3})
    assert AutoencoderSpec.from_json(json.loads(json.dumps(spec))) == spec
    with pytest.raises(ConfigError, match="unknown key"):
        AutoencoderSpec.from_json({**spec, "extra": 1})
