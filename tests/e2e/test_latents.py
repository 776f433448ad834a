"""From images to samples through an autoencoder by commands: train one, make a codec of it, cache, train, sample."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import said
from PIL import Image
from safetensors.torch import load_file

from ldit.cli.main import main
from ldit.codecs.codec import open_codec
from ldit.config.sections import DataConfig
from ldit.config.spec import AutoencoderConfig
from ldit.data.loader import Loader
from ldit.data.source import open_run_data
from ldit.rng import uniform
from ldit.training.tasks.inputs import CachedInputs, EncodedInputs

CPU = torch.device("cpu")
SMALL = [
    "--train.log-every",
    "1",
    "--train.checkpoint-every",
    "0",
    "--train.attention-every",
    "0",
    "--data.workers",
    "0",
]


def run(*arguments: object, code: int = 0) -> None:
    assert main([str(argument) for argument in arguments]) == code


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """images/ (three classes of noise, 16 px), vae/ (a codec of factor 2), bf16/ and fp32/ (caches)."""
    base = tmp_path_factory.mktemp("latents")
    random = np.random.default_rng(1)
    for index in range(24):
        path = base / "pictures" / "abc"[index % 3] / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (20, 16, 3), dtype=np.uint8)).save(path)
    (base / "pictures/heldout.txt").write_text("a/00.png\nb/01.png\nc/02.png\n")
    run("train", "emoji64-vae", "--out", base / "autoencoder", "--data.path", base / "pictures", *SMALL,
        "--data.image-size", 16, "--train.steps", 3, "--train.warmup", 0, "--train.cooldown", 0,
        "--train.batch-size", 4,
        "--model.block-out-channels", 8, 16, "--model.norm-num-groups", 4, "--train.precision", "fp32",
        "--heldout.every", 3, "--heldout.num", 3, "--train.sample-every", 0)  # fmt: skip
    run("convert", base / "autoencoder", base / "vae", "--to", "diffusers")
    for dtype in ("bf16", "fp32"):
        run("encode", base / "pictures", "--out", base / dtype, "--codec", base / "vae", "--image-size", 16,
            "--dtype", dtype, "--shard-size", 8, "--batch-size", 4)  # fmt: skip
    return base


def recipe(place: Path, out: Path, data: Path, *more: object) -> list[object]:
    stated = json.loads((place / "vae/config.json").read_text())
    return ["train", "emoji64-latent-s", "--out", out, "--data.path", data, *SMALL, "--data.image-size", 16,
            "--codec.name", place / "vae", "--codec.factor", 2, "--codec.scale", stated["scaling_factor"],
            "--codec.shift", stated["shift_factor"], "--model.input-size", 8, "--model.dim", 16, "--model.n-layers", 1,
            "--model.n-heads", 2, "--model.multiple-of", 16, "--model.num-classes", 3, "--train.steps", 3,
            "--train.warmup", 0, "--train.schedule", "constant", "--train.batch-size", 4,
            "--train.precision", "fp32", "--train.sample-every", 3,
            "--heldout.every", 3, "--heldout.num", 3, "--data.max-per-class", 0, *more]  # fmt: skip


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_images_and_their_cache_train_alike(place: Path, tmp_path: Path) -> None:
    """The same order, flips, posterior noise, noise and times: losses agree to what storing rounds off, 2^-8 of the
    moments in bf16 and the sums of another batch shape in fp32."""
    found = {}
    for name in ("pictures", "fp32", "bf16"):
        run(*recipe(place, tmp_path / name, place / name, "--data.flip", "true"))
        found[name] = losses(tmp_path / name)
        record = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()][-1]
        assert record["eps_mse"] > 0 and (tmp_path / name / "samples/step-00000003.png").is_file()
    assert found["fp32"] == pytest.approx(found["pictures"], rel=1e-5)
    assert found["bf16"] == pytest.approx(found["pictures"], rel=2**-7)
    assert found["bf16"] != found["fp32"]


@pytest.mark.parametrize(("dtype", "bound"), [("fp32", 1e-6), ("bf16", 2**-8)])
def test_cached_latents_are_those_of_encoding_now(dtype: str, bound: float, place: Path) -> None:
    """Same image, flip and posterior noise: the largest difference of z over its largest value."""
    config = AutoencoderConfig(str(place / "vae"), 0.7, 0.1, 2)
    codec = open_codec(config)
    images, _ = open_run_data(DataConfig(str(place / "pictures"), 16))
    cached, _ = open_run_data(DataConfig(str(place / dtype), 16))
    online, stored = EncodedInputs(codec, 3), CachedInputs(config, 3)
    flips = 0
    for a, b in zip(
        Loader(images, 7, 3, True, 0).from_step(0, 6), Loader(cached, 7, 3, True, 0).from_step(0, 6), strict=True
    ):
        assert torch.equal(a.labels, b.labels) and a.positions == b.positions
        x, y = online(a, CPU), stored(b, CPU)
        assert (x - y).abs().max() <= bound * x.abs().max()
        flips += sum(uniform(3, "flip", 0, position) < 0.5 for position in a.positions)
    assert 5 < flips < 37


def test_a_run_goes_on_with_its_cache_and_no_other(place: Path, tmp_path: Path, capfd) -> None:
    run(*recipe(place, tmp_path / "run", place / "fp32", "--train.steps", 2))
    run(*recipe(place, tmp_path / "run", place / "fp32"))
    run(*recipe(place, tmp_path / "whole", place / "fp32"))
    for name in ("model", "ema"):
        a, b = (load_file(tmp_path / run / f"checkpoints/step-00000003/{name}.safetensors") for run in ("run", "whole"))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    capfd.readouterr()
    run(*recipe(place, tmp_path / "run", place / "bf16", "--train.steps", 4), code=2)
    assert "training images differ from those" in capfd.readouterr().err


def test_other_codecs_sizes_and_damage_are_refused(place: Path, tmp_path: Path, capfd) -> None:
    other = shutil.copytree(place / "vae", tmp_path / "other")
    (other / "manifest.json").unlink()
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "mid_block_add_attention": False}))
    weights = load_file(other / "diffusion_pytorch_model.safetensors")
    from safetensors.torch import save_file

    weights["decoder.conv_out.bias"] = weights["decoder.conv_out.bias"] + 1
    save_file(weights, other / "diffusion_pytorch_model.safetensors")
    damaged = shutil.copytree(place / "bf16", tmp_path / "damaged")
    data = bytearray((damaged / "shard-00001.safetensors").read_bytes())
    data[-300] ^= 1
    (damaged / "shard-00001.safetensors").write_bytes(data)
    capfd.readouterr()
    for arguments, message in (
        (
            recipe(place, tmp_path / "a", place / "bf16", "--codec.name", other),
            "was made with the codec of fingerprint",
        ),
        (
            recipe(place, tmp_path / "a", place / "bf16", "--data.image-size", 32, "--model.input-size", 16),
            "of size 16",
        ),
        (recipe(place, tmp_path / "a", damaged), "shard-00001.safetensors is damaged"),
        (recipe(place, tmp_path / "a", place / "bf16", "--data.heldout", "x.txt"), "give it to ldit encode"),
        (recipe(place, tmp_path / "a", place / "bf16", "--data.max-per-class", 3), "data.max_per_class: 3, "),
        (recipe(place, tmp_path / "a", place / "bf16", "--data.exif"), "data.exif: True, "),
        (recipe(place, tmp_path / "a", place / "bf16", "--data.background", 0, 0, 0), "data.background: [0, 0, 0], "),
        (recipe(place, tmp_path / "a", place / "bf16", "--data.codec-precision", "bf16"), "data.codec_precision: "),
    ):
        run(*arguments, code=2)
        complaint = capfd.readouterr().err
        assert message in complaint and complaint.count("\n") == 1, complaint
    run("data", "check", damaged, code=1)
    run("data", "check", place / "bf16")


def test_a_cache_does_without_its_codec_but_not_with_a_broken_one(
    place: Path, tmp_path: Path, capfd, monkeypatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    absent = tmp_path / "absent" / place.joinpath("vae").name
    with said() as lines:
        run(*recipe(place, tmp_path / "run", place / "bf16", "--codec.name", absent, "--codec.shift", 7))
    assert any("is compared by name only" in line for line in lines) and any(
        "no sample grids" in line for line in lines
    )
    assert any(line.startswith("codec.shift: 7.0, that of the autoencoder") for line in lines)
    assert not any(line.startswith("codec.scale") for line in lines)
    assert not (tmp_path / "run/samples").exists()
    run(*recipe(place, tmp_path / "none", place / "bf16", "--codec.name", tmp_path / "mse"), code=2)
    assert "mse was not found" in capfd.readouterr().err
    broken = shutil.copytree(place / "vae", tmp_path / "broken")
    (broken / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    run(*recipe(place, tmp_path / "other", place / "bf16", "--codec.name", broken), code=2)
    assert "diffusion_pytorch_model.safetensors" in capfd.readouterr().err


def test_samples_of_a_latent_model(place: Path, tmp_path: Path) -> None:
    """The step names its codec by whole path, so that it works from anywhere; a moved codec is found below a root."""
    run(*recipe(place, tmp_path / "run", place / "bf16"))
    grid = tmp_path / "grid.png"
    run("sample", "--ckpt", tmp_path / "run", "--class-labels", "a", "b", "--steps", 2, "--image-save-path", grid)
    assert Image.open(grid).width > 100
    run("sample", "--ckpt", tmp_path / "run", "--class-labels", "c", "--steps", 2, "--height", 24, "--width", 32,
        "--image-save-path", grid)  # fmt: skip
    run("sample", "--ckpt", tmp_path / "run", "--class-labels", "c", "--steps", 2, "--latents-out", tmp_path / "z.npy")
    assert np.load(tmp_path / "z.npy").shape == (1, 4, 8, 8)


def test_a_codec_that_changes_under_a_run_is_noticed(place: Path, tmp_path: Path, capfd) -> None:
    """Images that are encoded in the step: the autoencoder's fingerprint is compared when the run goes on."""
    vae = shutil.copytree(place / "vae", tmp_path / "vae")
    (vae / "manifest.json").unlink()
    run(*recipe(place, tmp_path / "run", place / "pictures", "--codec.name", vae, "--train.steps", 2))
    weights = load_file(vae / "diffusion_pytorch_model.safetensors")
    from safetensors.torch import save_file

    weights["encoder.conv_in.bias"] = weights["encoder.conv_in.bias"] + 1
    save_file(weights, vae / "diffusion_pytorch_model.safetensors")
    capfd.readouterr()
    run(*recipe(place, tmp_path / "run", place / "pictures", "--codec.name", vae), code=2)
    assert "the autoencoder differs from that of" in capfd.readouterr().err


@pytest.mark.parametrize("codec", ["vae", "absent/vae"])
def test_a_cache_without_its_classes(place: Path, tmp_path: Path, codec: str, monkeypatch) -> None:
    """Latents stay latents when their labels are taken away."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    more = ("--codec.name", place / codec, "--model.num-classes", 0, "--train.sample-every", 0)
    run(*recipe(place, tmp_path / "run", place / "bf16", *more))
    assert len(losses(tmp_path / "run")) == 3


def test_the_commands_of_the_documents(tmp_path: Path) -> None:
    """The latent recipe's two lines as they are printed, but for fewer images and steps."""
    text = "".join((Path(__file__).parents[2] / "docs" / name).read_text() for name in ("data.md",))
    lines = [line.split("#")[0].split() for line in text.splitlines()]
    (encode,) = [line[1:] for line in lines if line[:3] == ["ldit", "encode", "emoji64"]]
    (training,) = [line[1:] for line in lines if line[:3] == ["ldit", "train", "emoji64-latent-s"] and "CACHE" in line]
    places = {"CACHE": str(tmp_path / "cache"), "runs/latent": str(tmp_path / "run")}
    small = ["--train.steps", 1, "--train.batch-size", 2, "--train.sample-every", 0, "--data.max-per-class", 2]
    assert encode[encode.index("--recipe") + 1] == "emoji64-latent-s" == training[1]
    encode, training = ([places.get(word, word) for word in line] for line in (encode, training))
    run(*encode, "--max-per-class", 2, "--heldout", "")
    run(*training, *small)
    assert len(losses(tmp_path / "run")) == 1
