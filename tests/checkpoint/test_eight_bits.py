"""Exports in 8 bits: what they cost in size and in numbers, through every door that reads weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ldit
from ldit.checkpoint.eight_bits import SCALE, packed, unpacked
from ldit.checkpoint.open import open_source
from ldit.cli.main import main
from ldit.errors import SourceError


def test_rows_are_rounded_by_their_own_scale() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(50, 64) * torch.logspace(-12, 3, 50)[:, None]
    matrix[7] = 0
    given = {"a.weight": matrix, "narrow": torch.randn(9, 8), "vector": torch.randn(64), "ints": torch.arange(3)}
    stored = dict(packed(given.items()))
    assert stored["a.weight"].dtype == torch.int8 and stored["narrow"].dtype == torch.bfloat16
    for order in (1, -1):  # in any order of the file
        back = dict(unpacked(list(stored.items())[::order]))
        assert back.keys() == given.keys() and back["a.weight"].dtype == torch.float32
        # Off by half a step at most, of which 127 make the largest number of the row.
        step = matrix.abs().amax(1, keepdim=True) / 127
        assert ((back["a.weight"] - matrix).abs() <= step * 0.5001).all()
        assert back["ints"].equal(given["ints"]) and back["vector"].equal(given["vector"].bfloat16())
    with pytest.raises(SourceError, match=r"a\.weight is stored in 8 bits without its other half"):
        dict(unpacked([("a.weight", stored["a.weight"])]))
    with pytest.raises(SourceError, match=r"3 scales|\(3,\) scales"):
        dict(unpacked([("a.weight", stored["a.weight"]), ("a.weight" + SCALE, torch.ones(3))]))


def test_a_model_in_8_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small, half = tmp_path / "int8", tmp_path / "bf16"
    for out, dtype in ((small, "int8"), (half, "bf16")):
        assert main(["convert", "emoji64-class-xs", str(out), "--dtype", dtype]) == 0
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (small, half)]
    assert 0.5 < sizes[0] / sizes[1] < 0.52
    assert main(["info", str(small), "--verify"]) == 0
    shown = capsys.readouterr().out
    assert "int8" in shown and "7.9M" in shown
    a, b = open_source(small), open_source(half)
    assert a.spec == b.spec and {k: v[0] for k, v in a.shapes(True).items()} == {
        k: v[0] for k, v in b.shapes(True).items()
    }
    images = [ldit.load(folder)(class_labels=[1, 4], steps=4, output_type="tensor") for folder in (small, half)]
    difference = (images[0] - images[1]).square().mean().sqrt() / images[1].std()
    assert 0 < difference < 0.05
    # A damaged half is told in one line.
    file = small / "model.safetensors"
    tensors: dict[str, Any] = load_file(file)
    name = next(name for name in tensors if name.endswith(SCALE))
    del tensors[name]
    (small / "manifest.json").unlink()
    save_file(tensors, file)
    with pytest.raises(SourceError, match="without its other half"):
        ldit.load(small)


def test_a_run_may_start_from_it(tmp_path: Path) -> None:
    assert main(["convert", "emoji64-class-xs", str(tmp_path / "int8"), "--dtype", "int8"]) == 0
    flags = ["--data.path", "emoji64", "--data.max-per-class", "2", "--train.steps", "1", "--train.batch-size", "2"]
    more = ["--train.init-from", str(tmp_path / "int8"), "--train.sample-every", "0", "--heldout.every", "0"]
    flags += [*more, "--train.warmup", "0", "--train.cooldown", "0", "--train.lr", "1e-12", "--data.workers", "0"]
    assert main(["train", "emoji64-class-xs", "--out", str(tmp_path / "run"), *flags]) == 0
    ours = dict(open_source(tmp_path / "run").tensors(ema=False))
    theirs = dict(open_source(tmp_path / "int8").tensors(ema=True))
    assert all(torch.allclose(ours[name].float(), theirs[name].float(), atol=1e-6) for name in theirs)
