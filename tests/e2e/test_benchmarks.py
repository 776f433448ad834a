"""Benchmark scripts run at their smallest size and end in one JSON object with the keys of the committed results."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_forward_tiny(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "forward.py"),
        "--device",
        "cpu",
        "--size",
        "tiny",
        "--rounds",
        "1",
    ]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "out.json")], capture_output=True, text=True, check=True, cwd=ROOT
    )
    report = json.loads(done.stdout.splitlines()[-1])
    assert report == json.loads((tmp_path / "out.json").read_text())
    committed = json.loads(next((ROOT / "benchmarks" / "results").glob("*_forward.json")).read_text())
    assert report.keys() == committed.keys()
    assert report["equal"] and report["relative_difference"] <= 1e-5 and report["median_ms"]["ours"] > 0


@pytest.mark.parametrize("theme", ["update", "memory", "save", "order"])
def test_training_tiny(theme: str) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "training.py"), theme, "--size", "tiny", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    report = json.loads(done.stdout.splitlines()[-1])
    committed = json.loads(next((ROOT / "benchmarks" / "results").glob(f"*_training-{theme}.json")).read_text())
    assert report.keys() == committed.keys()
    if theme == "memory":
        assert report["ratio"] == report["peak_bytes"]["ours"] / report["peak_bytes"]["plain"] > 0
    if theme == "order":
        assert all(held["at_start"] < 1 << 20 for held in report["bytes"].values()), "the order of a long run is free"


@pytest.mark.parametrize("theme", ["folder", "latents"])
def test_data_tiny(theme: str) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "data.py"), theme, "--size", "tiny", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    report = json.loads(done.stdout.splitlines()[-1])
    committed = json.loads(next((ROOT / "benchmarks" / "results").glob(f"*_data-{theme}*.json")).read_text())
    assert report.keys() == committed.keys()
    if theme == "latents":
        assert report["encode_flops_per_image"] > 0 and report["predicted_ratio"] > 1


@pytest.mark.parametrize(("theme", "flags"), [("variants", []), ("default", ["--steps", "4", "--batch", "1"])])
def test_sampling_tiny(theme: str, flags: list[str]) -> None:
    """Outputs are compared in the script, before anything is timed."""
    script = str(ROOT / "benchmarks" / "sampling.py")
    command = [sys.executable, script, theme, "--size", "tiny", "--rounds", "1", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    report = json.loads(done.stdout.splitlines()[-1])
    if theme == "variants":
        assert list(report["variants"]) == ["plain", "precomputed", "packed", "int8"]
        assert all(row["difference"] <= 0.05 and 0 < row["of_ceiling"] < 1 for row in report["variants"].values())
    else:
        fast = report["fast"]["4"]
        assert fast["latent_difference"] <= 1e-3 and fast["evaluation_ratio"] == 10 / fast["evaluations"]


def test_autoencoder_quality(tmp_path: Path) -> None:
    """The figures of the bundled autoencoder's card: what acceptance asks for, and the committed ones again."""
    command = [sys.executable, str(ROOT / "benchmarks" / "emoji64_autoencoder.py"), "--page", str(tmp_path / "p.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    report = json.loads(done.stdout.splitlines()[-1])
    committed = json.loads(next((ROOT / "benchmarks" / "results").glob("*_emoji64-autoencoder.json")).read_text())
    assert report["fingerprint"] == committed["fingerprint"] and (tmp_path / "p.png").stat().st_size > 10_000
    assert report["psnr"]["mean"] == pytest.approx(committed["psnr"]["mean"], abs=0.01)
    assert report["psnr"]["mean"] >= 27 and report["above_bicubic"] >= 5


def test_bench_train_tiny(tmp_path: Path) -> None:
    """The script for GPUs runs on a CPU, and every variant computes the same loss."""
    flags = [
        "--size",
        "tiny",
        "--device",
        "cpu",
        "--batch",
        "4",
        "--steps",
        "1",
        "--rounds",
        "1",
        "--precision",
        "fp32",
    ]
    command = [sys.executable, "-m", "ldit", "bench", "train", *flags, "--variants", "original", "fused"]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "out.json")], capture_output=True, text=True, check=True, cwd=ROOT
    )
    report = json.loads(done.stdout.splitlines()[-1])
    assert report == json.loads((tmp_path / "out.json").read_text())
    assert [row["name"] for row in report["variants"]] == ["original", "fused"]
    first, second = (row["first_loss"] for row in report["variants"])
    assert second == pytest.approx(first, rel=1e-5)
    assert all(row["images_per_second"] > 0 and 0 < row["of_ceiling"] < 1 for row in report["variants"])


def test_sizes_tiny(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "emoji64_sizes.py"), "--device", "cpu", "--size", "tiny"]
    page = ["--page", str(tmp_path / "p.png"), "--json", str(tmp_path / "out.json")]
    done = subprocess.run([*command, *page], capture_output=True, text=True, check=True, cwd=ROOT)
    report = json.loads(done.stdout.splitlines()[-1])
    assert report == json.loads((tmp_path / "out.json").read_text())
    assert [row["scaling"] for row in report["rows"]] == ["none", "none", "linear", "ntk", "time-aware", "time-aware"]
    assert (tmp_path / "p.png").stat().st_size > 10_000
