"""The Inception network against the golden file, and its two published forms."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from golden import assert_close
from inception_case import IMAGES, TOLERANCE, io, weights, without_counts
from safetensors.torch import save_file

from ldit.errors import EvaluationError, SourceError
from ldit.eval.extractors import inception_weights
from ldit.eval.extractors.inception import Inception, load_inception


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A .pth file with all entries."""
    path = tmp_path_factory.mktemp("inception") / inception_weights.NAMES[0]
    torch.save(weights(), path)
    yield path
    path.unlink()  # 95 MB, and pytest keeps its folders


@pytest.fixture(scope="module")
def network(published: Path) -> Inception:
    return load_inception(published, check_hash=False)


@pytest.mark.parametrize("case", IMAGES)
def test_golden(case: str, network: Inception) -> None:
    found = network(io()[f"{case}.x"])
    assert list(found) == ["pool", "spatial", "logits_unbiased"]
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32 and not tensor.requires_grad
        assert_close(tensor, io()[f"{case}.{name}"], TOLERANCE)


def test_the_file_without_counts(network: Inception, tmp_path: Path) -> None:
    """As safetensors: the same numbers in every convolution."""
    assert len(weights()) == 566 and len(without_counts()) == 472
    path = tmp_path / "inception.safetensors"
    save_file(without_counts(), path)
    other = load_inception(str(path), check_hash=False)
    path.unlink()
    theirs = dict(other.named_parameters())
    assert all(torch.equal(value, theirs[name]) for name, value in network.named_parameters())


def test_the_published_names_are_all_there_is(network: Inception) -> None:
    """With the head 23,850,960 parameters; the folded bias stands for the scale and shift of a channel."""
    places = network.places()
    assert len(places) == 94
    folded = sum(parameter.numel() for parameter in network.parameters())
    assert folded + sum(place.unit.bias.numel() for place in places) == 23_850_960


def test_only_the_published_file_passes_for_it(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        EvaluationError, match=r"is not the published pt_inception.*\.pth: 95,[\d,]+ bytes with sha256 "
    ):
        load_inception(published)
    digest = hashlib.sha256(published.read_bytes()).hexdigest()
    monkeypatch.setattr(inception_weights, "SHA256", digest)
    assert isinstance(load_inception(published), Inception)


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    for name, content in {"a.pth": {"Conv2d_1a_3x3.conv.weight": torch.zeros(32, 3, 3, 3)}, "b.pth": [1.0]}.items():
        torch.save(content, tmp_path / name)
    with pytest.raises(EvaluationError, match=r"a\.pth lacks Conv2d_1a_3x3\.bn\.weight$"):
        load_inception(tmp_path / "a.pth", check_hash=False)
    with pytest.raises(SourceError, match=r"b\.pth is not a state dict"):
        load_inception(tmp_path / "b.pth", check_hash=False)
    with pytest.raises(SourceError, match=r"c\.pth is missing"):
        load_inception(tmp_path / "c.pth", check_hash=False)
    (tmp_path / "d.safetensors").write_bytes(b"no weights")
    with pytest.raises(SourceError, match=r"d\.safetensors is damaged"):
        load_inception(tmp_path / "d.safetensors", check_hash=False)


def test_always_fp32(network: Inception) -> None:
    """Whatever autocast says outside."""
    x = io()["s64.x"][:1]
    expected = network(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = network(x)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (3, 8, 8)])
def test_only_rgb_bytes_are_taken(shape: tuple[int, ...], network: Inception) -> None:
    with pytest.raises(EvaluationError, match=r"takes uint8 images \(B, 3, H, W\), got torch\.uint8 "):
        network(torch.zeros(shape, dtype=torch.uint8))
    with pytest.raises(EvaluationError, match=r"got torch\.float32"):
        network(torch.zeros(1, 3, 8, 8))
