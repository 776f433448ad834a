"""An export takes along a codec that was given by path, and is whole wherever it is taken."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from folders import make_folder, over, said
from PIL import Image

from ldit.checkpoint.run import step_folder
from ldit.cli.main import main
from ldit.codecs.autoencoder import AutoencoderCodec
from ldit.codecs.kl_config import read_kl_config
from ldit.commands.convert import convert
from ldit.commands.train import run as train
from ldit.config.assets import ASSETS
from ldit.config.spec import AutoencoderConfig
from ldit.errors import CodecError
from ldit.storage import manifest

BUNDLED = ASSETS / "models" / "emoji64-vae"
STEM = "diffusion_pytorch_model"


def latent_run(place: Path, name: str) -> Path:
    """A run of one step in the latents of the autoencoder `name`."""
    own = read_kl_config(BUNDLED)
    config = over(make_folder(place / "data", side=16), {
        "codec.": AutoencoderConfig(name, *own.scaling, own.factor), "model.in_channels": 4, "model.input_size": 4,
        "data.image_size": 16, "train.steps": 1,
    })  # fmt: skip
    assert train(config, place / "run") == 0
    return place / "run"


@pytest.fixture
def codec(tmp_path: Path) -> Path:
    """A copy of the bundled autoencoder, as a folder of the user's."""
    folder = tmp_path / "models" / "mine"
    folder.mkdir(parents=True)
    for name in ("config.json", f"{STEM}.safetensors"):
        shutil.copyfile(BUNDLED / name, folder / name)
    return folder


def sampled(source: Path, grid: Path) -> bytes:
    assert main(["sample", "--ckpt", str(source), "--class-labels", "a", "--steps", "2", "--seed", "3",
                 "--image-save-path", str(grid)]) == 0  # fmt: skip
    return Image.open(grid).tobytes()


def fingerprint(folder: Path) -> str:
    return AutoencoderCodec(AutoencoderConfig(factor=4), folder).fingerprint()


def test_an_export_has_its_codec_with_it(
    codec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run and codec are moved away, and the export too; the images stay the same. An export of it is as whole."""
    run = latent_run(tmp_path, str(codec))
    before, name = sampled(run, tmp_path / "before.png"), fingerprint(codec)
    assert main(["convert", str(run), str(tmp_path / "out")]) == 0
    out = Path(shutil.move(tmp_path / "out", tmp_path / "elsewhere"))
    for path in (run, codec):
        shutil.move(path, path.with_name("gone"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tmp_path / "data", tmp_path / "codec")  # the name means nothing of the working directory
    assert json.loads((out / "config.json").read_text())["codec"]["name"] == "codec"
    assert {"codec/config.json", f"codec/{STEM}.safetensors"} <= manifest.read(out).keys()
    assert sampled(out, tmp_path / "after.png") == before and fingerprint(out / "codec") == name
    again = convert(out, tmp_path / "again", dtype="bf16")
    assert fingerprint(again / "codec") == name
    capsys.readouterr()
    weights = bytearray((again / "codec" / f"{STEM}.safetensors").read_bytes())
    weights[-1] ^= 1
    (again / "codec" / f"{STEM}.safetensors").write_bytes(weights)
    assert main(["info", str(again), "--verify"]) == 2
    assert f"codec/{STEM}.safetensors is damaged" in capsys.readouterr().err


def test_bundled_names_stay_names(tmp_path: Path) -> None:
    out = convert(latent_run(tmp_path, "emoji64-vae"), tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["codec"]["name"] == "emoji64-vae"
    assert not (out / "codec").exists()


def test_a_bundled_name_is_no_folder_that_happens_to_lie_here(
    tmp_path: Path, codec: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.move(codec, tmp_path / "emoji64-vae")
    step = step_folder(latent_run(tmp_path, "emoji64-vae"), 1)
    assert json.loads((step / "config.json").read_text())["codec"]["name"] == "emoji64-vae"


def test_a_pickled_codec_becomes_safetensors(codec: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    torch.save(load_file(codec / f"{STEM}.safetensors"), codec / f"{STEM}.bin")
    (codec / f"{STEM}.safetensors").unlink()
    out = convert(latent_run(tmp_path, str(codec)), tmp_path / "out")
    assert sorted(path.name for path in (out / "codec").iterdir()) == ["config.json", f"{STEM}.safetensors"]
    assert fingerprint(out / "codec") == fingerprint(codec)


def test_a_codec_that_is_gone_or_another_one(codec: Path, tmp_path: Path) -> None:
    """Weights can be converted without it; one that does not fit is refused, and nothing is left behind."""
    run = latent_run(tmp_path, str(codec))
    stated = json.loads((codec / "config.json").read_text())
    (codec / "config.json").write_text(json.dumps({**stated, "latent_channels": 8}))
    with pytest.raises(CodecError, match="latents of 8 channels, the model's have 4"):
        convert(run, tmp_path / "out")
    shutil.rmtree(codec)
    with said() as lines:
        convert(run, tmp_path / "out")
    assert lines == [f"the autoencoder {codec} was not found: {tmp_path / 'out'} names it by that path"]
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out"]
