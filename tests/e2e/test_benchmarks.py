"""Benchmark scripts run at their smallest size and end in one JSON object with the keys of the committed results."""

import json
import subprocess
import sys
from pathlib import Path

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
