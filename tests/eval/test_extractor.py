"""Extractors by name, and what they say of themselves."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from golden import assert_close
from inception_case import TOLERANCE, io, weights
from PIL import Image
from torch import Tensor

from ldit.config.sections import EvalConfig
from ldit.errors import EvaluationError
from ldit.eval.extractors import inception_weights, lite0
from ldit.eval.extractors.extractor import open_extractor, open_named
from ldit.eval.extractors.inception import Inception
from ldit.eval.extractors.protocol import PROTOCOLS
from ldit.eval.extractors.resize import tf1_bilinear

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


def test_protocols_of_other_packages(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each prepares images as the package does, written here with Pillow or as a product of matrices."""
    sent: list[Tensor] = []
    monkeypatch.setattr(Inception, "_features", lambda self, x: sent.append(x) or {"pool": x, "logits_unbiased": x})
    x = torch.randint(0, 256, (2, 3, 40, 33), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))

    def prepared(protocol: str) -> Tensor:
        extractor = open_extractor("inception", published, CPU, protocol)
        assert extractor.protocol == protocol  # type: ignore[attr-defined]
        extractor(x)
        return sent.pop()

    # torch-fidelity resizes as TensorFlow 1 does.
    assert torch.equal(prepared("adm"), (tf1_bilinear(x, 299) - 128.0) / 128.0)
    assert torch.equal(prepared("torch-fidelity"), prepared("adm"))

    # pytorch-fid: pixel i of 299 is at (i + 1/2)·in/299 - 1/2, held within the picture; 0 is -1, and 255 is 1.
    def weights_of(length: int) -> Tensor:
        place = ((torch.arange(299, dtype=torch.float64) + 0.5) * length / 299 - 0.5).clamp(0, length - 1)
        return (1.0 - (place[:, None] - torch.arange(length)).abs()).clamp(min=0.0)

    expected = weights_of(40) @ (x.double() / 127.5 - 1.0) @ weights_of(33).T
    assert_close(prepared("pytorch-fid"), expected.float(), 2e-5)  # a place up to 40 in fp32, times a step of up to 2

    # clean-fid: Pillow's bicubic of each channel as numbers, not as bytes.
    def pillow(channel: Tensor) -> Tensor:
        image = Image.fromarray(channel.float().numpy()).resize((299, 299), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(image).clip(0, 255))

    resized = torch.stack([torch.stack([pillow(channel) for channel in image]) for image in x])
    assert_close(prepared("clean-fid"), (resized - 128.0) / 128.0, 2e-5)
    # No protocol resizes images of 299 x 299, or changes what it is given.
    whole = torch.randint(0, 256, (1, 3, 299, 299), dtype=torch.uint8)
    for protocol in PROTOCOLS.values():
        before = whole.clone()
        assert_close(protocol.prepare(whole), whole.float() / 127.5 - 1.0, 0.008)  # 128 or 127.5 in the middle
        assert torch.equal(whole, before)


def test_a_run_may_name_every_protocol() -> None:
    assert {*get_args(get_type_hints(EvalConfig)["protocol"])} == {"", *PROTOCOLS}


def test_a_protocol_that_is_not_there(published: Path) -> None:
    with pytest.raises(EvaluationError, match=r"protocol: expected adm, torch-fidelity, .*, got 'x'"):
        open_named("inception", published, CPU, "x")
    with pytest.raises(EvaluationError, match="protocol: is for inception, the extractor is efficientnet-lite0"):
        open_named("efficientnet-lite0", None, CPU, "adm")


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
