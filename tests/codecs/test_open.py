"""Where autoencoders are looked for, and what is said when there is none."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ldit.codecs import open as opening
from ldit.codecs.autoencoder import AutoencoderCodec
from ldit.codecs.codec import check_codec, open_codec
from ldit.codecs.open import codec_folder, find_codec, portable_name
from ldit.codecs.pixels import PixelCodec
from ldit.config.spec import AutoencoderConfig, PixelCodecConfig
from ldit.errors import CodecError

NAME = "some-org/some-vae"
CONFIG = AutoencoderConfig(NAME)
STEM = "diffusion_pytorch_model"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    return place


def test_order(saved: Path, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The roots one by one, bundled, the working directory; the first that has a configuration."""
    monkeypatch.setattr(opening, "ASSETS", tmp_path / "assets")
    roots = [tmp_path / "first", tmp_path / "second"]
    places = [*roots, tmp_path / "assets" / "models", here]
    assert find_codec(NAME, roots) is None
    for place in reversed(places):
        shutil.copytree(saved, place / NAME)
        found = find_codec(NAME, roots)
        assert found is not None and found.resolve() == (place / NAME).resolve()
    for place in places[:-1]:
        (place / NAME / "config.json").unlink()
        assert find_codec(NAME, roots) != place / NAME
    assert find_codec(NAME, roots) == Path(NAME)
    (places[-1] / NAME / "config.json").unlink()
    assert find_codec(NAME, roots) == roots[0] / NAME  # none is whole: the first is what a message speaks of
    assert find_codec(str(saved)) == saved


def test_a_root_is_the_codec_or_holds_it(
    saved: Path, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--codec-root for a name of the Hub: the folder that holds org/name, the one that holds name, or the codec itself;
    a model is none."""
    name = "stabilityai/sd-vae-ft-mse"
    for place in ("a/stabilityai/sd-vae-ft-mse", "b/sd-vae-ft-mse", "c"):
        shutil.copytree(saved, tmp_path / place)
        root = tmp_path / place.split("/")[0]
        assert find_codec(name, [root]) == tmp_path / place
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"format": 1}')
    assert find_codec(name, [tmp_path / "model"]) is None


def test_a_path_is_taken_as_it_is(saved: Path, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """./ names a folder of the working directory whatever else has that name."""
    monkeypatch.setattr(opening, "ASSETS", tmp_path / "assets")
    for place in (here, tmp_path / "root", tmp_path / "assets" / "models"):
        shutil.copytree(saved, place / "vae")
    assert find_codec("./vae", [tmp_path / "root"]) == Path("vae")
    assert find_codec(str(here / "vae"), [tmp_path / "root"]) == here / "vae"
    assert find_codec("vae", [tmp_path / "root"]) == tmp_path / "root" / "vae"
    assert find_codec("vae") == tmp_path / "assets" / "models" / "vae"


def test_a_path_that_is_gone(saved: Path, here: Path, tmp_path: Path, offline: Path) -> None:
    """Its last two parts and its last one are looked for below the roots, each place once."""
    gone, root = f"/no/{NAME}", tmp_path / "root"
    assert find_codec(gone, [root]) is None
    with pytest.raises(CodecError) as caught:
        open_codec(AutoencoderConfig(gone), [root, root])
    assert f"looked in {gone}, {root / NAME}, {root / 'some-vae'}; " in str(caught.value)
    for place in (root / "some-vae", root / NAME):
        shutil.copytree(saved, place)
        assert find_codec(gone, [root]) == place


def test_portable_names(saved: Path, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step says, which is opened from anywhere: bundled names and those of the Hub stay."""
    monkeypatch.setattr(opening, "ASSETS", tmp_path / "assets")
    shutil.copytree(saved, tmp_path / "assets" / "models" / "bundled")
    for name in ("bundled", "own"):
        shutil.copytree(saved, here / name)
    assert portable_name("bundled") == "bundled" and portable_name("org/name") == "org/name"
    assert portable_name("./bundled") == str(here / "bundled") and portable_name("own") == str(here / "own")


@pytest.mark.parametrize("name", ["", "x\0y", "a" * 5000, "~nobody/x", "../../../x", "-"])
def test_no_names(name: str, here: Path, offline: Path) -> None:
    assert find_codec(name, [here]) is None
    with pytest.raises(CodecError, match="was not found"):
        open_codec(AutoencoderConfig(name), [here])


def test_pixels_need_nothing() -> None:
    assert isinstance(open_codec(PixelCodecConfig()), PixelCodec)
    check_codec(PixelCodecConfig())


def test_a_pipeline_folder(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / NAME / "vae")
    codec = open_codec(CONFIG, [tmp_path], dtype=torch.bfloat16)
    assert isinstance(codec, AutoencoderCodec) and codec.folder == tmp_path / NAME / "vae"
    assert codec.dtype is torch.bfloat16
    (tmp_path / NAME / "config.json").write_text("{}")  # of something else
    assert codec_folder(NAME, [tmp_path]) == tmp_path / NAME / "vae"


def test_not_at_hand(here: Path, tmp_path: Path, offline: Path) -> None:
    for action in (open_codec, check_codec):
        with pytest.raises(CodecError) as caught:
            action(CONFIG, [tmp_path / "root"])
        message = str(caught.value)
        for said in (
            repr(NAME), str(here / NAME), str(tmp_path / "root" / NAME), "HF_HUB_OFFLINE is set",
            "--codec-root DIR", "--local-diffusers-model-root",
        ):  # fmt: skip
            assert said in message, message
        assert "\n" not in message
    with pytest.raises(CodecError, match="there is no such folder"):  # nothing the Hub could be asked for
        open_codec(AutoencoderConfig(str(tmp_path / "absent")))


@pytest.mark.parametrize("kind", ["safetensors", "bin", "vae"])
def test_from_the_hubs_cache(kind: str, saved: Path, here: Path, offline: Path, config: AutoencoderConfig) -> None:
    repository = offline / "models--some-org--some-vae"
    snapshot = repository / "snapshots" / ("0" * 40)
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    folder = snapshot / "vae" if kind == "vae" else snapshot
    shutil.copytree(saved, folder)
    if kind == "bin":
        from safetensors.torch import load_file

        torch.save(load_file(folder / f"{STEM}.safetensors"), folder / f"{STEM}.bin")
        (folder / f"{STEM}.safetensors").unlink()
    codec = open_codec(CONFIG)
    assert isinstance(codec, AutoencoderCodec) and codec.folder == folder
    assert codec.fingerprint() == AutoencoderCodec(config, saved).fingerprint()


def test_what_the_hub_is_asked_for(saved: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pickled twin of a file comes only where there is no other."""
    asked: list[list[str]] = []

    def hub(text: str, files: list[str]) -> Path:
        asked.append(files)
        return saved

    monkeypatch.setattr(opening, "from_hub", hub)
    assert codec_folder(NAME) == saved
    (patterns,) = asked
    assert {"config.json", "vae/config.json", f"{STEM}.safetensors"} <= set(patterns)
    assert not any(".bin" in pattern or pattern.startswith("*") for pattern in patterns)
    asked.clear()
    monkeypatch.setattr(opening, "from_hub", lambda text, files: asked.append(files) or here)
    assert codec_folder(NAME) == here
    assert f"{STEM}.bin" in asked[1]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"format": "run-1", "model": {"kind": "autoencoder"}}, "`ldit convert {} OUT --to diffusers` makes a codec"),
        ({"format": 1, "model": {"kind": "autoencoder"}}, "`ldit convert {} OUT --to diffusers` makes a codec of it"),
        ({"format": 1, "model": {"kind": "class"}}, "{} is a diffusion model, not an autoencoder"),
        ({"_class_name": "UNet2DModel"}, "config.json: _class_name: expected AutoencoderKL, got 'UNet2DModel'"),
        ({}, "config.json: _class_name"),
    ],
)
def test_folders_of_another_kind(content: dict[str, object], said: str, tmp_path: Path) -> None:
    folder = tmp_path / NAME
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(CodecError) as caught:
        open_codec(CONFIG, [tmp_path])
    assert said.format(folder) in str(caught.value)


def test_channels_of_the_model(saved: Path, tmp_path: Path, edit: Callable[..., None], folder: Path) -> None:
    config = AutoencoderConfig(str(folder))
    check_codec(config, channels=4)
    for action in (open_codec, check_codec):
        with pytest.raises(CodecError, match="latents of 4 channels, the model's have 16"):
            action(config, channels=16)  # type: ignore[operator]
    (folder / f"{STEM}.safetensors").unlink()
    with pytest.raises(CodecError, match=f"has neither {STEM}.safetensors"):
        check_codec(config)


LAZY = """
import sys, ldit
from ldit.codecs.codec import check_codec, open_codec
from ldit.config.spec import AutoencoderConfig, PixelCodecConfig
import ldit.commands.sample, ldit.cli.main
open_codec(PixelCodecConfig())
check_codec(AutoencoderConfig(sys.argv[1]))
assert "diffusers" not in sys.modules
open_codec(AutoencoderConfig(sys.argv[1]))
assert "diffusers" in sys.modules and "torchvision" not in sys.modules
print("done")
"""


def test_diffusers_is_imported_late_and_torchvision_never(saved: Path, tmp_path: Path) -> None:
    """With a torchvision that is installed and cannot be imported."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('torchvision is imported')")
    record = tmp_path / "torchvision-0.99.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.99.0\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.path.insert(0, 'src')\n{LAZY}"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code, str(saved)], capture_output=True, text=True, cwd=root)
    assert (done.returncode, done.stdout.strip()) == (0, "done"), done.stderr
