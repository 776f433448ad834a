"""From a model with an autoencoder to images, through every door."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import ldit
from ldit.checkpoint.export import write_export
from ldit.cli.main import main
from ldit.cli.original import sample as original_sample
from ldit.codecs.autoencoder import AutoencoderCodec
from ldit.config.model import ClassModelConfig
from ldit.config.spec import AutoencoderConfig, ClassConditionerConfig, DDPMConfig, ModelSpec
from ldit.errors import CodecError
from ldit.nn.build import build_model

VAE = "stabilityai/sd-vae-ft-ema"
CONFIG = ClassModelConfig(
    dim=32, n_layers=1, n_heads=2, multiple_of=16, input_size=4, in_channels=4, num_classes=3, qk_norm=True
)
SPEC = ModelSpec(CONFIG, DDPMConfig(), AutoencoderConfig(VAE), ClassConditionerConfig(("a", "b", "c")))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    network = build_model(CONFIG)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    write_export(folder, SPEC, network.state_dict().items())
    return folder


@pytest.fixture
def root(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "root" / VAE)
    return tmp_path / "root"


def test_a_pipeline_decodes_what_it_samples(model: Path, root: Path, reference: Any) -> None:
    pipe = ldit.load(model, "cpu", codec_root=root)
    latents = pipe.sample([0, 2], steps=2, output_type="latent")
    images = pipe.sample([0, 2], steps=2, output_type="tensor")
    assert images.shape == (2, 3, 32, 32)
    torch.testing.assert_close(images, reference.decode(latents / 0.18215).sample, rtol=0, atol=1e-4)
    assert isinstance(pipe.codec, AutoencoderCodec) and pipe.codec is pipe.codec
    assert pipe.codec.dtype is torch.float32
    assert pipe.to(torch.bfloat16).codec.dtype is torch.float32  # on the CPU


def test_sample_py(model: Path, root: Path, tmp_path: Path, reference: Any) -> None:
    """The original's command and its grid: padding of 2, clamped, (x + 1)/2·255 + ½ truncated."""
    files = tmp_path / "grid.png", tmp_path / "latents.safetensors"
    flags = ["--ckpt", str(model), "--local_diffusers_model_root", str(root), "--class_labels", "1"]
    flags += ["--num_sampling_steps", "2", "--image_save_path", str(files[0])]
    assert original_sample.run(flags) == 0
    assert original_sample.run([*flags, "--latents_out", str(files[1])]) == 0
    latents = load_file(files[1])["latents"]
    expected = ((reference.decode(latents / 0.18215).sample[0].clamp(-1, 1) + 1) / 2 * 255 + 0.5).permute(1, 2, 0)
    shown = np.asarray(Image.open(files[0]))
    assert shown.shape == (36, 36, 3)
    error = np.abs(shown[2:34, 2:34].astype(float) - expected.numpy().astype(np.uint8))
    assert error.max() <= 1  # where a value lies at the edge of two


def test_a_codec_beside_the_weights(model: Path, saved: Path, tmp_path: Path) -> None:
    """`codec` in the checkpoint's own folder, as exports name it."""
    folder = tmp_path / "export"
    folder.mkdir()
    spec = replace(SPEC, codec=AutoencoderConfig("codec"))
    write_export(folder, spec, load_file(model / "model.safetensors").items())
    shutil.copytree(saved, folder / "codec")
    codec = ldit.load(folder, "cpu").codec
    assert isinstance(codec, AutoencoderCodec) and codec.folder == folder / "codec"


@pytest.mark.parametrize("fault", ["absent", "no weights", "other factor", "other channels"])
def test_faults_of_the_codec_come_before_weights_are_read(
    fault: str,
    model: Path,
    root: Path,
    tmp_path: Path,
    offline: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("ldit.commands.sample.load_source", None)  # would fail if it were called
    folder = root / VAE
    if fault == "absent":
        shutil.rmtree(folder)
    elif fault == "no weights":
        next(folder.glob("*.safetensors")).unlink()
    else:
        config = folder / "config.json"
        change = ('"latent_channels": 4', '"latent_channels": 8')
        if fault == "other factor":
            text = config.read_text().replace("\n", " ")
            change = ("8, ", "")  # a level less
            for key in ("DownEncoderBlock2D", "UpDecoderBlock2D"):
                text = text.replace(f'"{key}",', "", 1)
            config.write_text(" ".join(text.split()))
        config.write_text(config.read_text().replace(*change, 1))
    command = ["sample", "--ckpt", str(model), "--local-diffusers-model-root", str(root), "--steps", "2"]
    assert main([*command, "--device", "cpu", "--image-save-path", str(tmp_path / "x.png")]) == 2
    said = {
        "absent": f"the autoencoder '{VAE}' was not found",
        "no weights": "has neither",
        "other factor": "a latent pixel is 4 pixels wide, the model's codec.factor is 8",
        "other channels": "latents of 8 channels, the model's have 4",
    }[fault]
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1, error


def test_latents_need_no_codec(model: Path, tmp_path: Path, offline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "latents.npy"
    assert main(["sample", "--ckpt", str(model), "--steps", "1", "--device", "cpu", "--latents-out", str(out)]) == 0
    assert np.load(out).shape == (3, 4, 4, 4)
    with pytest.raises(CodecError, match="was not found"):
        _ = ldit.load(model, "cpu").codec
