"""What downloads and other tools leave in a model's place, and steps that are read while their run goes on."""

import gc
import gzip
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import FOLDER
from safetensors.torch import load_file
from torch import Tensor

from ldit.checkpoint import run as runs
from ldit.checkpoint.open import open_source
from ldit.checkpoint.run import committed_steps, retire
from ldit.cli.main import dispatch
from ldit.data.images.decoding import BadImage, Decoding, open_image
from ldit.data.source import open_data
from ldit.errors import CodecError, DataError, EvaluationError, LditError, RequestError, SourceError
from ldit.eval.reference import read_statistics
from ldit.pipeline.load import load_model, open_model
from ldit.storage.tensors import read_safetensors

HEADS = 4
ODD = {
    "lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 2575\n",
        "is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`",
    ),
    "html": (b"\n<!DOCTYPE html><html><body>404</body></html>", "is a web page, not the file itself"),
    "xml": (
        b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
        "is XML, such as a server's error message",
    ),
    "empty": (b"", "is damaged: it is empty"),
    "gzip": (gzip.compress(b"x" * 99), "is packed"),
    "zeros": (b"\0" * 4096, "is damaged: it begins with zeros alone"),
}


@pytest.fixture(scope="module")
def raw() -> dict[str, Tensor]:
    return load_file(FOLDER / "dit_tiny.weights.safetensors")


@pytest.mark.parametrize("kind", ODD)
def test_accidents_are_called_by_their_names(kind: str, tmp_path: Path, save: Callable[..., Path], run: Path) -> None:
    """In place of every file that a command opens."""
    content, said = ODD[kind]
    step = save(1)
    images, tars = tmp_path / "images", tmp_path / "tars"
    for folder in (images, tars, tmp_path / "lone"):
        folder.mkdir()
    opened: dict[str, tuple[type[LditError], Callable[[Path], Any]]] = {
        "model.pt": (SourceError, lambda path: open_source(path, heads=HEADS)),
        "model.pth": (SourceError, lambda path: open_source(path, heads=HEADS)),
        "model.ckpt": (SourceError, lambda path: open_source(path, heads=HEADS)),
        "model.safetensors": (SourceError, lambda path: list(read_safetensors(path))),
        "lone/config.json": (SourceError, lambda path: open_source(path.parent)),
        "statistics.npz": (EvaluationError, read_statistics),
        "tars/a.tar": (DataError, lambda path: open_data(str(path.parent), 8)),
    }
    for name, (error, action) in opened.items():
        path = tmp_path / name
        if name == "lone/config.json":
            (path.parent / "model.safetensors").write_bytes((step / "model.safetensors").read_bytes())
        if name == "tars/a.tar" and kind in ("zeros", "empty"):
            continue  # archives without a member
        path.write_bytes(content)
        with pytest.raises(error) as caught:
            action(path)
        assert f"{path} {said}"[: len(str(path)) + 9] in str(caught.value), (name, str(caught.value))
    (images / "1.png").write_bytes(content)
    if kind != "empty":
        with pytest.raises(BadImage) as bad:
            open_image(images / "1.png", Decoding())
        assert str(bad.value).startswith(said)
    # In a run's step the manifest notices, and the words are the same.
    (step / "model.safetensors").write_bytes(content)
    with pytest.raises(SourceError) as caught:
        load_model(open_source(step, ema=False), ema=False)
    assert said in str(caught.value)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_taken_off(
    prefix: str, raw: dict[str, Tensor], tmp_path: Path, same: Callable[..., bool]
) -> None:
    """Of either state dict, also where only one of them has them."""
    wrapped, ema = {prefix + name: t for name, t in raw.items()}, {name: t * 0.5 for name, t in raw.items()}
    for content, whole in (
        (wrapped, {False: raw, True: raw}),
        ({"model": wrapped, "ema": ema}, {False: raw, True: ema}),
        ({"model": raw, "ema": {prefix + name: t for name, t in ema.items()}}, {False: raw, True: ema}),
    ):
        torch.save(content, tmp_path / "dit.pt")
        for average, expected in whole.items():
            source = open_source(tmp_path / "dit.pt", heads=HEADS, ema=average)
            assert same(load_model(source, ema=average).state_dict(), expected)
    torch.save({f"{prefix}pos_embed": raw["pos_embed"], **raw}, tmp_path / "dit.pt")
    with pytest.raises(SourceError):
        load_model(open_source(tmp_path / "dit.pt", heads=HEADS))


def test_only_the_weights_that_are_asked_for_are_judged(
    raw: dict[str, Tensor], tmp_path: Path, same: Callable[..., bool]
) -> None:
    for odd in ({"lora.a": torch.zeros(2)}, [1, 2], {"step": 3}):
        torch.save({"model": odd, "ema": raw}, tmp_path / "dit.pt")
        assert same(load_model(open_source(tmp_path / "dit.pt", heads=HEADS)).state_dict(), raw)
        with pytest.raises(SourceError, match="model"):
            load_model(open_source(tmp_path / "dit.pt", heads=HEADS, ema=False), ema=False)


def test_a_run_without_a_commit(tmp_path: Path) -> None:
    """For every command that takes a source, before and after the folder of its steps exists."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text('{"format": "run-1", "model": {"kind": "class"}, "train": {"steps": 9}}')
    for folder in (None, "checkpoints"):
        if folder:
            (run / folder).mkdir()
        for command in (
            ["sample", "--ckpt", str(run), "--image-save-path", str(tmp_path / "x.png")],
            ["info", str(run)],
            ["convert", str(run), str(tmp_path / "out")],
            ["evaluate", str(run), "--reference", "emoji64", "--extractor", "efficientnet-lite0", "--num", "2"],
        ):
            with pytest.raises(LditError, match="no committed step yet"):
                dispatch(command[0], command[1:])


def test_a_missing_autoencoder_names_flags_that_there_are(tmp_path: Path) -> None:
    line = ["emoji64-latent-s", "--codec.name", str(tmp_path / "none"), "--out", str(tmp_path / "run")]
    with pytest.raises(CodecError, match=r"give its folder: --codec\.name DIR") as caught:
        dispatch("train", line)
    assert "codec-root" not in str(caught.value)


def test_labels_with_commas(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x.png"
    command = ["--ckpt", "emoji64-class-xs", "--steps", "1", "--image-save-path", str(file), "--class-labels"]
    for labels, count in ((["1,2,3"], 3), (["1, 2"], 2), (["flags,Foo", "0"], 3), (["1,"], 1)):
        assert dispatch("sample", [*command, *labels]) == 0
        assert f"{count} images" in capsys.readouterr().out
    with pytest.raises(RequestError, match="unknown class ','"):
        dispatch("sample", [*command, ","])


def test_a_step_that_is_read_stays(save: Callable[..., Path], run: Path) -> None:
    """With keep 1 a run would take it away between opening and reading. It goes at a later commit."""
    save(1)
    source = open_source(run)
    save(2)
    retire(run, 1, 0)
    assert [step for step, _ in committed_steps(run)] == [2, 1]
    assert load_model(source) is not None
    other = open_source(run)
    save(3)
    retire(run, 1, 0)
    assert [step for step, _ in committed_steps(run)] == [3, 2, 1]
    del source, other
    gc.collect()
    retire(run, 1, 0)
    assert [step for step, _ in committed_steps(run)] == [3]
    direct = open_source(runs.step_folder(run, 3))
    save(4)
    retire(run, 1, 0)
    assert [step for step, _ in committed_steps(run)] == [4, 3] and direct


def test_what_sampling_opens_holds_the_step_too(save: Callable[..., Path], run: Path) -> None:
    """The user's objects are attached to a copy of what was opened."""
    save(1)
    opened = open_model(run)
    save(2)
    retire(run, 1, 0)
    assert [step for step, _ in committed_steps(run)] == [2, 1] and load_model(opened) is not None
    del opened
    gc.collect()
    retire(run, 1, 0)
    assert [step for step, _ in committed_steps(run)] == [2]


def test_sampling_beside_a_run_with_keep_1(save: Callable[..., Path], run: Path) -> None:
    """Commits and removals as fast as they go, and openings and readings beside them: none may fail."""
    save(1)
    over, failed = threading.Event(), []

    def read() -> None:
        while not over.is_set():
            try:
                load_model(open_model(run))
            except Exception as error:
                failed.append(error)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for step in range(2, 40):
        save(step)
        retire(run, 1, 0)
    over.set()
    for reader in readers:
        reader.join()
    assert not failed, failed
    gc.collect()
    retire(run, 1, 0)
    assert len(committed_steps(run)) == 1
