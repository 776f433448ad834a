"""The verbs of the shell as functions of Python: the same keywords, the same results."""

import json
from pathlib import Path

import pytest
from commands import encoding
from eval.evaluation import Stub, folder, noise
from pipeline.sets import exported

import ldit
from ldit.cli.main import main
from ldit.commands import encode as flow
from ldit.errors import ConfigError
from ldit.eval import evaluate as evaluation


def test_evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The dict is what --json writes."""
    monkeypatch.setattr(evaluation, "open_named", lambda name, weights, device, protocol=None: Stub())
    model, reference = exported(tmp_path / "model"), folder(tmp_path / "b", noise(9, 1))
    report = ldit.evaluate(model, reference, num=8, extractor="stub", num_inference_steps=2, device="cpu")
    assert capsys.readouterr().out == ""
    command = ["evaluate", str(model), "--reference", str(reference), "--extractor", "stub", "--num", "8"]
    assert main([*command, "--steps", "2", "--device", "cpu", "--json", str(tmp_path / "r.json")]) == 0
    written = json.loads((tmp_path / "r.json").read_text())
    for clock in ("seconds", "peak_memory", "date"):
        del report[clock], written[clock]
    assert json.loads(json.dumps(report)) == written


def test_encode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoding.write_images(tmp_path / "images")
    monkeypatch.setattr(flow, "open_autoencoder", lambda request, device: encoding.FakeCodec())
    size = encoding.SIZE
    made = ldit.encode(tmp_path / "images", tmp_path / "cache", image_size=size, workers=0, device="cpu")
    assert made == tmp_path / "cache" and (made / "manifest.json").is_file()
    with pytest.raises(ConfigError, match="--image-size: must be at least 1"):
        ldit.encode(tmp_path / "images", tmp_path / "cache", image_size=0)
