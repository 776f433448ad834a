"""Where the Inception weights are looked for, and what is said when there are none."""

import hashlib
from pathlib import Path

import pytest
import torch
from folders import said

from ldit.cli.main import dispatch
from ldit.errors import EvaluationError
from ldit.eval.extractors import inception_weights
from ldit.eval.extractors.inception_weights import (
    NAMES,
    SHA256,
    VARIABLE,
    check_weights,
    fetch_weights,
    find_weights,
)


@pytest.fixture(autouse=True)
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of the machine's owner leads anywhere."""
    for name in (VARIABLE, "TORCH_HOME", "HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"weights")
    return path


def test_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path given, the variable, torch.hub's folder under either name, the Hub's cache."""
    snapshot = tmp_path / "cache/huggingface/hub/models--some--fid/snapshots/0123"
    checkpoints = tmp_path / "cache/torch/hub/checkpoints"
    for place in (snapshot / NAMES[1], snapshot / NAMES[0], checkpoints / NAMES[1], checkpoints / NAMES[0]):
        assert put(place) == find_weights() == find_weights(None)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(VARIABLE, "~/named.pth")
    assert put(tmp_path / "named.pth") == find_weights()
    given = put(tmp_path / "given.pth")
    assert find_weights(given) == given == find_weights(Path("~/given.pth"))


def test_caches_follow_their_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = Path("models--some--fid/snapshots/0123") / NAMES[0]
    for name, root in (("HF_HOME", "home/hub"), ("HF_HUB_CACHE", "elsewhere")):
        monkeypatch.setenv(name, str(tmp_path / root.removesuffix("/hub")))
        assert put(tmp_path / root / inside) == find_weights()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    assert put(tmp_path / "torch/hub/checkpoints" / NAMES[1]) == find_weights()


def test_a_folder_that_holds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(EvaluationError, match=f"folder with neither {NAMES[0]} nor {NAMES[1]}"):
        find_weights(folder)
    inside = put(folder / NAMES[1])
    assert find_weights(folder) == inside
    monkeypatch.setenv(VARIABLE, str(folder))
    assert find_weights() == inside


def test_what_is_named_and_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No other file is taken in its place."""
    put(tmp_path / "cache/torch/hub/checkpoints" / NAMES[0])
    with pytest.raises(EvaluationError, match=r"given\.pth: no such file"):
        find_weights(tmp_path / "given.pth")
    monkeypatch.setenv(VARIABLE, "~/gone.pth")
    with pytest.raises(EvaluationError, match=rf"gone\.pth: {VARIABLE} names it, but"):
        find_weights()


def test_nothing_anywhere(tmp_path: Path) -> None:
    """One line: which file, its size and hash, where it is published, where to put it, how to name it."""
    with pytest.raises(EvaluationError) as caught:
        find_weights()
    text = str(caught.value)
    wanted = [NAMES[0], "95,628,359 bytes", SHA256, "https://github.com/mseitzer/pytorch-fid/releases/"]
    wanted += [str(tmp_path / "cache/torch/hub/checkpoints"), "--inception-weights", VARIABLE]
    assert all(word in text for word in wanted) and "\n" not in text


def test_the_hash_is_compared(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=rf"x\.pth is not the published .*: 7 bytes .* 95,628,359 with {SHA256}"):
        check_weights(put(tmp_path / "x.pth"))
    with pytest.raises(EvaluationError, match=r"gone\.pth: no such file"):
        check_weights(tmp_path / "gone.pth")


def test_fetched_where_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into torch.hub's folder, once; another file is refused and nothing is left; the log says where it went."""
    source = put(tmp_path / "published.pth")
    monkeypatch.setattr(inception_weights, "URL", source.as_uri())
    with pytest.raises(EvaluationError, match="is not the published"):
        fetch_weights()
    hub = tmp_path / "cache/torch/hub/checkpoints"
    assert list(hub.iterdir()) == []
    monkeypatch.setattr(inception_weights, "SHA256", hashlib.sha256(b"weights").hexdigest())
    with said() as lines:
        assert fetch_weights() == hub / NAMES[0] == find_weights()
    assert (hub / NAMES[0]).read_bytes() == b"weights" and str(hub / NAMES[0]) in lines[-1]
    source.unlink()
    assert fetch_weights() == hub / NAMES[0]  # it is there
    (hub / NAMES[0]).unlink()
    with pytest.raises(EvaluationError, match="cannot be downloaded"):
        fetch_weights()
    request = ["evaluate", "emoji64", "--reference", "emoji64", "--fetch"]
    with pytest.raises(EvaluationError, match=r"fetch: is for Inception's published weights"):
        dispatch("evaluate", [*request[1:], "--extractor", "efficientnet-lite0"])
