"""Sets of images that are not made: another one stands there, something else does, or the command makes none."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline.models import tiny_flow
from pipeline.sets import KINDS, NUM, OPTIONS, contents, exported, job, made

from ldit.cli.main import main
from ldit.errors import LditError, RequestError, RunError
from ldit.storage import manifest


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("complete", [False, True])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num": NUM + 1}, f"made with num {NUM}, this command has {NUM + 1}"),
        ({"batch_size": 5}, "made with batch_size 4, this command has 5"),
        ({"options": {**OPTIONS, "seed": 6}}, "made with seed 5, this command has 6"),
        ({"options": {**OPTIONS, "guidance": 3.0}}, "made with sampling.guidance 2.0, this command has 3.0"),
        ({"options": {**OPTIONS, "steps": "4"}}, "made with sampling.steps 3, this command has 4"),
        ({"labels": "random"}, "made with label_rule balanced, this command has random"),
        ({"class_labels": ("1",)}, "made with classes None, this command has [1]"),
        ({"dtype": "bf16"}, "made with dtype fp32, this command has bf16"),
        ({"options": {**OPTIONS, "height": 16}}, "made with size [8, 8], this command has [16, 8]"),
    ],
)
def test_another_set_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    kind: str, complete: bool, changes: dict[str, Any], said: str,
) -> None:  # fmt: skip
    """While it is made and after; nothing is changed."""
    out = tmp_path / kind
    made(monkeypatch, job(source), out, 0, 1 if complete else 2)
    before = contents(out)
    with pytest.raises(RequestError) as caught:
        made(monkeypatch, job(source, **changes), out)
    assert f"--out {out}: {said}" in str(caught.value) and contents(out) == before


def test_other_weights_are_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By their fingerprint, the guide's too."""
    out, other = tmp_path / "set", exported(tmp_path / "other", tiny_flow(weights=1))
    made(monkeypatch, job(source, guide=str(other)), out, 0, 2)
    for changes, key in (({"guide": str(source)}, "guide.weights"), ({}, "guide.weights")):
        with pytest.raises(RequestError, match=f"made with {key} [0-9a-f]{{12}}, this command has"):
            made(monkeypatch, job(source, **changes), out)
    with pytest.raises(RequestError, match=r"made with weights [0-9a-f]{12}, this command has [0-9a-f]{12}"):
        made(monkeypatch, job(other, guide=str(other)), out)


def refused(out: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    with pytest.raises(LditError) as caught:
        made(monkeypatch, job(source), out)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_places_that_hold_something_else(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They stay as they are."""
    full = tmp_path / "full"
    full.mkdir()
    (full / "000000.png").write_bytes(b"mine")
    assert "holds 000000.png, which is not of this set" in refused(full, source, monkeypatch)
    assert (full / "000000.png").read_bytes() == b"mine"
    made(monkeypatch, job(source), tmp_path / "set", 0, 2)
    (tmp_path / "set/000022.png").write_bytes(b"mine")
    assert "holds 000022.png" in refused(tmp_path / "set", source, monkeypatch)
    (tmp_path / "file").write_bytes(b"mine")
    assert "is a file, expected a folder" in refused(tmp_path / "file", source, monkeypatch)
    (tmp_path / "folder.npz").mkdir()
    assert "is a folder, expected the name of a file" in refused(tmp_path / "folder.npz", source, monkeypatch)
    (tmp_path / "mine.npz").write_bytes(b"mine")
    assert "exists, but mine.npz.json does not" in refused(tmp_path / "mine.npz", source, monkeypatch)
    assert made(monkeypatch, job(source), tmp_path / "ours.npz")
    os.replace(tmp_path / "mine.npz", tmp_path / "ours.npz")
    assert "is not the file that ours.npz.json describes" in refused(tmp_path / "ours.npz", source, monkeypatch)
    assert (tmp_path / "ours.npz").read_bytes() == b"mine"
    (tmp_path / "sealed").mkdir()
    (tmp_path / "sealed/manifest.json").write_text(json.dumps(manifest.sealed({})))
    assert "sealed" in refused(tmp_path / "sealed/set", source, monkeypatch)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/samples.json").write_text("{")
    assert "samples.json is damaged" in refused(tmp_path / "broken", source, monkeypatch)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--num", "0"], "num: must be at least 1, got 0"),
        (["--num", "5", "--per-class", "2"], "per_class 2"),
        (["--num", "5", "--init-image", "x.png"], "init_image"),
        (["--num", "5", "--latents-out", "x.npy"], "latents_out"),
        (["--num", "5", "--class-labels", "cow"], "cow"),
        (["--num", "5", "--batch-size", "0"], "batch_size"),
        (["--labels", "random"], "labels random: is for sets"),
    ],
)
def test_commands_that_make_no_set(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    assert main(["sample", "--ckpt", str(source), "--out", str(tmp_path / "set"), *flags]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1 and not (tmp_path / "set").exists()


def test_commands_without_a_place(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sample", "--ckpt", str(source), "--image-save-path", str(tmp_path / "grid.png")]
    assert main([*command, "--num", "5"]) == 2
    assert "num 5: this model has classes; --out DIR or FILE.npz makes a set" in capsys.readouterr().err
    assert main([*command, "--out", str(tmp_path / "x.npz")]) == 2
    assert "say how many with --num" in capsys.readouterr().err


def test_images_that_are_not_finite_end_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first one is named."""
    pipe = tiny_flow()
    with torch.no_grad():
        pipe.model.y_embedder.embedding_table.weight[2] = float("nan")
    source = exported(tmp_path / "model", pipe)
    with pytest.raises(RunError, match=r"image 2 \(seed 7, class 2\) is not finite"):
        made(monkeypatch, job(source), tmp_path / "set")
