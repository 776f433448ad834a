"""Extractors by name, and what they say of themselves."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from golden import assert_close
from inception_case import TOLERANCE, io, weights

from ldit.errors import EvaluationError
from ldit.eval.extractors import inception_weights, lite0
from ldit.eval.extractors.extractor import open_extractor

CPU = torch.device("cpu")


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A weights file that passes for the published one."""
    path = tmp_path / "weights.pth"
    torch.save(weights(), path)
    monkeypatch.setattr(inception_weights, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    yield path
    path.unlink()


def test_inception(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extractor = open_extractor("inception", published, CPU)
    assert (extractor.name, extractor.metric, extractor.width) == ("inception", "fid", 2048)
    assert extractor.fingerprint == inception_weights.SHA256
    assert extractor.resize == "299x299, TensorFlow-1 bilinear"
    found = extractor(io()["s64.x"])
    assert found.spatial is not None and found.logits is not None
    for tensor, name in ((found.pool, "pool"), (found.spatial, "spatial"), (found.logits, "logits_unbiased")):
        assert_close(tensor, io()[f"s64.{name}"], TOLERANCE)


def test_inception_is_looked_for(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `find_weights` looks; and a file that is not the published one makes no FID."""
    monkeypatch.setenv(inception_weights.VARIABLE, str(published))
    assert open_extractor("inception", None, CPU).fingerprint == inception_weights.SHA256
    monkeypatch.setattr(inception_weights, "SHA256", "0" * 64)
    with pytest.raises(EvaluationError, match="is not the published"):
        open_extractor("inception", None, CPU)


def test_lite0() -> None:
    """One image more than a whole number of slices, into which a batch falls on the CPU: each at its place."""
    extractor = open_extractor("efficientnet-lite0", None, CPU)
    name = "efficientnet-lite0"
    assert (extractor.name, extractor.metric, extractor.width) == (name, f"fd_{name}", 1280)
    assert extractor.fingerprint == hashlib.sha256(lite0.package_weights().read_bytes()).hexdigest()
    assert extractor.resize == "224x224, antialiased bicubic"
    x = torch.randint(0, 256, (9, 3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found, expected = extractor(x), lite0.load_lite0()(x)
    assert found.spatial is None and found.logits is not None
    assert_close(found.pool, expected["pool"], 2e-6)
    assert_close(found.logits, expected["logits"], 2e-6)


def test_a_trained_classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any folder is the classifier's to judge; it brings its own weights."""
    opened = SimpleNamespace()
    monkeypatch.setattr(
        "ldit.eval.extractors.extractor.open_classifier", lambda *args: setattr(opened, "args", args) or opened
    )
    assert open_extractor(str(tmp_path), None, CPU) is opened
    assert opened.args == (tmp_path, CPU)
    with pytest.raises(EvaluationError, match="a trained classifier has its weights in its own folder"):
        open_extractor(str(tmp_path), tmp_path / "weights.pth", CPU)


@pytest.mark.parametrize("name", ["Inception", "efficientnet", "runs/gone", ""])
def test_unknown_names(name: str) -> None:
    with pytest.raises(EvaluationError, match=r"expected inception, efficientnet-lite0, or the folder .*, got '"):
        open_extractor(name, None, CPU)
