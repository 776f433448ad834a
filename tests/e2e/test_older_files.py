"""Files that an older version wrote open, resume and finish: tests/golden/files, whose README names the commit.

Every test reruns the old commands in a copy of the folder and compares with the results of the older version. On the
same kind of machine results are equal to the last bit; on others sums have another order, so tolerances apply.
"""

import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from e2e import older_files as older
from golden_losses import machine
from PIL import Image
from safetensors.torch import load_file

from ldit.cli.main import main

FILES = Path(__file__).parents[1] / "golden" / "files"
FINISHED = json.loads((FILES / "finished.json").read_text(encoding="utf-8"))
SAME_MACHINE = machine() == FINISHED["machine"]

# Losses, relative, of the kernels of another instruction set: fp32 4e-8 at most, bf16 1.5e-4 (measured, torch 2.13).
FP32_LOSSES, BF16_LOSSES = 2e-6, 2e-3
# Of the largest number: 2⁻²⁴ a rounding, some hundred of which meet in an output. AMD's kernels of another instruction
# set differ by 6e-7, Intel's by 7e-6 at most.
FP32 = 2e-5
BF16 = 2.0**-7  # relative: a mean or log-variance may round the other way


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the files as current folder, and one thread, as when they were written."""
    copy = shutil.copytree(FILES, tmp_path / "files")
    monkeypatch.chdir(copy)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield copy
    torch.set_num_threads(threads)


def rerun(*names: str) -> None:
    for name in names:
        assert main(shlex.split(older.COMMANDS[name])) == 0


def close(found: torch.Tensor, golden: torch.Tensor, tolerance: float = FP32) -> bool:
    return found.shape == golden.shape and bool((found - golden).abs().max() <= tolerance * golden.abs().max())


def same_log(found: list[dict[str, Any]], golden: list[dict[str, Any]], tolerance: float = FP32_LOSSES) -> None:
    """The same steps, every key of the golden lines (new keys may be added), and the same numbers; on other machines
    the losses within `tolerance`."""
    assert [line["step"] for line in found] == [line["step"] for line in golden]
    common = [{key: line.get(key) for key in old} for line, old in zip(found, golden, strict=True)]
    assert all(line.keys() >= old.keys() for line, old in zip(found, golden, strict=True))
    if SAME_MACHINE:
        assert common == golden
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in golden], rel=tolerance)


def kept_lines(run: Path, step: int) -> list[str]:
    """The lines of metrics.jsonl up to a step, with their images/s, which no other run repeats."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [line for line in lines if json.loads(line)["step"] <= step]


@pytest.mark.parametrize("name", older.RUNS)
def test_a_stopped_run_is_finished(name: str) -> None:
    """Killed, or stopped by a signal, half-way: it resumes from its committed step, not from the start. The rest of the
    log, the files and every tensor in them equal those of the run that the older version finished."""
    run, golden = Path("stopped", name), FINISHED[name]
    (committed,) = (int(path.name[-8:]) for path in (run / "checkpoints").iterdir())
    before = kept_lines(run, committed)
    rerun(name)
    assert len(before) == committed and kept_lines(run, committed) == before
    found = older.finished(name)
    same_log(found["metrics"], golden["metrics"], BF16_LOSSES if name == "muon" else FP32_LOSSES)
    assert found["files"] == golden["files"]
    assert found["tensors"].keys() == golden["tensors"].keys()
    if SAME_MACHINE:
        assert found["tensors"] == golden["tensors"]
    if name == "muon":
        snapshots_make_an_average()


def snapshots_make_an_average() -> None:
    """`ldit ema` reads an old snapshot and a new one."""
    rerun("average")
    assert load_file("average/model.safetensors").keys() == load_file("exports/ldit/model.safetensors").keys()
    if SAME_MACHINE:
        assert older.hashes(Path("average"), "*.safetensors") == FINISHED["average"]


def test_an_unfinished_cache_is_finished() -> None:
    """Three training shards and three held-out ones are there, a seventh has its temporary name; no manifest yet."""
    stopped, golden = Path("stopped/cache"), older.hashes(Path("finished/cache"))
    before = older.hashes(stopped, "shard-*.safetensors")
    assert len(before) == 6 and list(stopped.rglob("*.tmp-*")) and not (stopped / "manifest.json").exists()
    stamps = {name: (stopped / name).stat().st_mtime_ns for name in before}
    rerun("cache")
    found = older.hashes(stopped)
    assert found.keys() == golden.keys()
    assert {name: (stopped / name).stat().st_mtime_ns for name in before} == stamps, "finished parts are not made again"
    if SAME_MACHINE:
        assert found == golden
    for name in golden.keys() - {"manifest.json", "heldout/manifest.json"}:
        ours, theirs = load_file(stopped / name), load_file(f"finished/cache/{name}")
        assert ours.keys() == theirs.keys() and torch.equal(ours["label"], theirs["label"])
        for key in ("mean", "logvar"):
            torch.testing.assert_close(ours[key], theirs[key], rtol=BF16, atol=BF16 / 100)


def test_a_finished_cache_is_known_and_trains() -> None:
    """`ldit encode` has nothing left to do; a run trains on it, with its held-out part."""
    before = older.hashes(Path("finished/cache"))
    assert main(shlex.split(older.COMMANDS["cache"].replace("stopped/", "finished/"))) == 0
    assert older.hashes(Path("finished/cache")) == before
    rerun("latents")
    same_log(older.metrics(Path("latents")), FINISHED["latents"])


def test_an_unfinished_folder_of_samples_is_finished() -> None:
    """Two of seven blocks are there, a third is half written; the images equal those of the array."""
    out = Path("stopped/set")
    assert len(list(out.glob("*.png"))) == 6 and list(out.glob(".work-*/*.png"))
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.png")}
    rerun("folder")
    found = older.hashes(out)
    assert found.keys() == FINISHED["folder"].keys()
    assert {path: path.stat().st_mtime_ns for path in before} == before, "finished parts are not made again"
    if SAME_MACHINE:
        assert found == FINISHED["folder"]
    images = np.stack([np.asarray(Image.open(path)) for path in sorted(out.glob("*.png"))])
    assert same_images(images)


def test_an_unfinished_array_of_samples_is_finished() -> None:
    """Three of seven blocks are there, in the folder of parts."""
    out, parts = Path("stopped/set.npz"), Path("stopped/set.npz.parts")
    assert len(list(parts.glob("block-*"))) == 3 and list(parts.glob(".work-*/*.npy")) and not out.exists()
    rerun("array")
    with np.load(out) as found, np.load("finished/set.npz") as golden:
        assert list(found) == list(golden) == ["arr_0", "arr_1"]
        assert same_images(found["arr_0"]) and (found["arr_1"] == golden["arr_1"]).all()
    assert not parts.exists()
    if SAME_MACHINE:
        for name in ("set.npz", "set.npz.json"):
            assert Path("stopped", name).read_bytes() == Path("finished", name).read_bytes()


def same_images(found: np.ndarray) -> bool:
    """Equal to those of the finished set; on other machines a value may round the other way."""
    with np.load("finished/set.npz") as file:
        golden = file["arr_0"]
    difference = np.abs(found.astype(int) - golden.astype(int))
    return found.shape == golden.shape and bool(difference.max() <= (0 if SAME_MACHINE else 1))


def test_a_finished_set_is_known() -> None:
    before = older.hashes(Path("finished"))
    assert main(shlex.split(older.COMMANDS["array"].replace("stopped/", "finished/"))) == 0
    assert older.hashes(Path("finished")) == before


@pytest.mark.parametrize("source", older.MODELS)
def test_an_export_gives_the_same_numbers(source: str) -> None:
    """Outputs for fixed inputs and two sampled latents, with EMA weights and with raw ones."""
    golden = {key: value for key, value in load_file("outputs.safetensors").items() if key.startswith(f"{source} ")}
    found = older.outputs(source)
    assert found.keys() == golden.keys() and len(found) == 4
    assert [key for key, value in found.items() if not close(value, golden[key])] == []


KNOWN = {
    "exports/ldit": {"kind": "ldit", "weights": ["raw", "ema"], "step": 16, "parameters": 5752, "image_size": 16},
    "exports/original": {"kind": "original", "weights": ["raw", "ema"], "parameters": 6232, "image_size": 128},
    "exports/dit.pt": {"kind": "dit-pt", "weights": ["raw", "ema"], "parameters": 4184, "image_size": 64},
    "exports/autoencoder": {"kind": "autoencoder_kl", "factor": 2, "latent_channels": 2},
    "stopped/adamw": {"kind": "ldit", "weights": ["raw", "ema"], "step": 12, "parameters": 6232, "image_size": 16},
    "stopped/classifier": {"kind": "classifier", "step": 7, "classes": 9, "features": 8, "image_size": 32},
    "stopped/autoencoder": {"kind": "autoencoder", "step": 6, "factor": 2, "latent_channels": 2},
}


@pytest.mark.parametrize("source", KNOWN)
def test_info_reads_and_verifies_it(source: str, capfd: pytest.CaptureFixture[str]) -> None:
    heads = ["--heads", "2"] if source in older.HEADS else []
    assert main(["info", source, "--json", "--verify", *heads]) == 0
    report = json.loads(capfd.readouterr().out)
    assert {key: report.get(key) for key in KNOWN[source]} == KNOWN[source] and report["verified"] is True


def test_an_exported_autoencoder_encodes_the_same() -> None:
    rerun("codes")
    assert close(older.codes(Path("codes")), load_file("outputs.safetensors")["codes"])


def test_statistics_are_a_reference_of_the_same_extractor() -> None:
    """An old classifier, old statistics and an old set of samples give the same distance."""
    rerun("evaluation")
    report = json.loads(Path("evaluation.json").read_text(encoding="utf-8"))
    golden = dict(FINISHED["evaluation"])
    assert report["fd_classifier"] == pytest.approx(golden.pop("fd_classifier"), rel=1e-4)
    assert {key: report[key] for key in golden} == golden


def test_statistics_are_written_as_before() -> None:
    rerun("statistics")
    with np.load("statistics.npz") as found, np.load(FILES / "statistics.npz") as golden:
        assert list(found) == list(golden) == ["mu", "sigma", "about"]
        about = json.loads(bytes(found["about"]))
        assert about.pop("size") == [32, 32] and about == json.loads(bytes(golden["about"]))  # the size came later
        for key in ("mu", "sigma"):
            np.testing.assert_allclose(found[key], golden[key], rtol=0, atol=1e-5 * np.abs(golden[key]).max())
