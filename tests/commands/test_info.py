"""`ldit info` of autoencoders: a run, a step of it, a codec's folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ldit.cli.main import main
from ldit.commands.convert import convert
from ldit.commands.train import run as train
from ldit.config.autoencoder import AutoencoderModelConfig, AutoencoderRun
from ldit.config.sections import DataConfig, EMAConfig, HeldoutConfig, TrainConfig
from ldit.errors import SourceError


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("info") / "run"
    config = AutoencoderRun(
        model=AutoencoderModelConfig(2, (8, 16), 1, 4, mid_block_attention=False),
        data=DataConfig("emoji64", 16, max_per_class=4, workers=0),
        train=TrainConfig(steps=2, batch_size=4, checkpoint_every=1, attention_every=0),
        ema=EMAConfig(0.9),
        heldout=HeldoutConfig(every=2, num=4),
    )
    assert train(config, out) == 0
    return out


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["info", *map(str, arguments), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main(["info", *map(str, arguments)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_a_run_and_its_steps(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest = run / "checkpoints/step-00000002"
    found = told(capsys, run)
    assert found == told(capsys, newest)
    stated = json.loads((newest / "config.json").read_text())
    assert found["config"] == stated and found["statistics"] == stated["latents"]
    wanted = {"kind": "autoencoder", "path": str(newest), "factor": 2, "latent_channels": 2, "step": 2,
              "weights": ["raw", "ema"], "dtype": "fp32"}  # fmt: skip
    assert {key: found[key] for key in wanted} == wanted
    before = told(capsys, run / "checkpoints/step-00000001")
    assert before["statistics"] is None and before["parameters"] == found["parameters"] > 1000
    assert main(["info", str(run)]) == 0
    assert "latent_channels" in capsys.readouterr().out


def test_a_codec_has_the_numbers_of_its_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = convert(run, tmp_path / "vae", to="diffusers", dtype="bf16")
    source, found = told(capsys, run), told(capsys, folder, "--verify")
    assert found["kind"] == "autoencoder_kl" and found["verified"] and found["dtype"] == "bf16"
    for key in ("parameters", "entries", "factor", "latent_channels"):
        assert found[key] == source[key], key
    assert found["shift"] == source["statistics"]["mean"] and len(found["fingerprint"]) == 64


def test_the_bundled_codec(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = told(capsys, "emoji64-vae")
    assert found["kind"] == "autoencoder_kl" and (found["factor"], found["latent_channels"]) == (4, 4)
    assert found["parameters"] == 1_620_391 and "verified" not in found


def test_everything_is_verified(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Optimiser state too, which no other reader of weights looks at; and a codec without a manifest is opened."""
    copy = shutil.copytree(run, tmp_path / "run")
    state = next((copy / "checkpoints/step-00000002/state").glob("optimizer*"))
    data = bytearray(state.read_bytes())
    data[-1] ^= 1
    state.write_bytes(data)
    assert told(capsys, copy)["step"] == 2 and told(capsys, run, "--verify")["verified"]
    assert f"{state.name} is damaged" in refused(capsys, copy, "--verify")
    folder = convert(run, tmp_path / "vae", to="diffusers")
    (folder / "config.json").write_text((folder / "config.json").read_text().replace("16", "20"))
    assert "config.json is damaged" in refused(capsys, folder, "--verify")
    (folder / "manifest.json").unlink()
    assert "has shape" in refused(capsys, folder, "--verify")


def test_heads_belong_to_other_sources(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for source in (run, "emoji64-vae"):
        assert "heads are those of a DiT .pt" in refused(capsys, source, "--heads", 3)
        assert "process is that of a DiT .pt" in refused(capsys, source, "--process", "flow")
    with pytest.raises(SourceError, match=r"process is that of a DiT \.pt"):
        convert(run, run / "x", "diffusers", process="flow")


@pytest.mark.parametrize("source", ["", "a" * 5000, "~nobody/x", "no-such-model"])
def test_names_of_nothing(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, source)


def test_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    """Short rows; class names are counted, and all of them are in the JSON."""
    assert main(["info", "emoji64-class-xs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) < 250 and len(lines) < 16
    assert (
        "parameters     7.9M in 101 tensors" in lines and "forward        0.697 GFLOP for an image of 64 x 64" in lines
    )
    assert any("9 names (activities, animals, flags, … and 6 more; all with --json)" in line for line in lines)
    assert told(capsys, "emoji64-class-xs")["config"]["conditioner"]["names"][8] == "travel"
