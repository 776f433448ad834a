"""What a GPU would be asked to do, on one that is not there: memory, launches, waits, graphs, and whether scripts run.

The device is a library that is loaded before a CUDA build of torch and plays its runtime. Allocations are address
space, kernels are counted by name, and nothing is computed. LDIT_NULL_GPU names its folder, whose `run` starts a
command on it; without that these tests are skipped. 1 GB = 1e9 bytes; an 80 GB card has 84.9.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEVICE = Path(os.environ.get("LDIT_NULL_GPU", ""))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not os.environ.get("LDIT_NULL_GPU"), reason="LDIT_NULL_GPU names no simulated device"),
]
CARD, H200 = 79.1, 139.8  # GiB


def on_device(*command: str, gib: float = CARD, name: str = "NVIDIA H100 80GB HBM3", **more: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "NULL_GB": str(gib), "NULL_NAME": name, **more}
    # The device has no memory segments that grow, which training would ask for.
    env.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:False")
    done = subprocess.run([str(DEVICE / "run"), *command], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    return done.stdout


def stepped(options: str, gib: float = CARD) -> dict[str, Any]:
    printed = on_device("python", "tests/null_gpu/steps.py", *options.split(), gib=gib)
    row: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return row


def test_the_recipes_step() -> None:
    """7B on eight cards of 80 GB with the recipe's own settings: one wait, one graph, 8 GB free, a fifth fewer launches
    than in eager mode at least."""
    settings = "--recipe imagenet256-7b --local 64 --micro 32 --world 8"
    row, eager = stepped(settings), stepped(f"{settings} --eager")
    for one in (row, eager):
        assert one["reserved_gb"] <= 84.9 - 8 and one["waits"] == {"cudaEventSynchronize": 1} and not one["fault"]
    assert row["compilation"] == {"graphs": 1, "graph_breaks": 0, "recompiles": 0}
    assert row["launches"] <= 0.8 * eager["launches"]
    # Gradients are summed over the shards in every micro-batch, over replicas once a step.
    hybrid = stepped("--recipe imagenet256-600m --local 32 --micro 16 --world 8 --replicate 2")
    assert hybrid["collectives"]["allreduce_"][0] <= 0.6 * hybrid["collectives"]["_reduce_scatter_base_"][0]


@pytest.mark.parametrize(
    ("options", "gib", "most"),
    [
        ("--recipe imagenet256-3b --local 32 --recompute full --moments bf16", CARD, 70),
        ("--recipe imagenet256-3b --local 32 --recompute full --moments int8 --ema-host", CARD, 42),
        ("--recipe imagenet256-7b --local 32 --recompute full --moments bf16", H200, 120),
        ("--recipe imagenet256-7b --local 16 --recompute full --moments int8 --ema-host", CARD, 73),
    ],
)
def test_memory_of_one_card(options: str, gib: float, most: float) -> None:
    row = stepped(options, gib)
    assert "out_of_memory" not in row and row["peak_gb"] <= most, row


def test_an_evaluation_is_one_launch() -> None:
    """Captures are legal with and without compiled blocks, and hold one launch."""
    rows = json.loads(on_device("python", "tests/null_gpu/evaluations.py").splitlines()[-1])
    assert rows["plain"]["launches"] > 1000 > rows["compiled"]["launches"]
    for name in ("graph", "graph+compiled"):
        assert rows[name] == {"launches": 1, "waits": {}, "graphs": 1}


def test_the_gpu_tests_raise_no_exception() -> None:
    """`pytest -m gpu`: numbers are wrong, for nothing computes them; all else must work."""
    command = ("python", "-m", "pytest", "-m", "gpu", "-q", "--assert=plain", "--tb=short", "-o",
               "addopts=--import-mode=importlib", "tests/gpu")  # fmt: skip
    done = subprocess.run(
        [str(DEVICE / "run"), *command], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "NULL_GB": str(H200), "NULL_NAME": "NVIDIA H200"},
    )  # fmt: skip
    errors = [line for line in done.stdout.splitlines() if line.startswith("E  ")]
    strange = [line for line in errors if not line.split()[1].startswith(("AssertionError", "assert", "Failed"))]
    assert "passed" in done.stdout.splitlines()[-1] and not strange


def test_the_update_kernel_computes() -> None:
    """The same kernel in Triton's interpreter, which has numbers."""
    python = DEVICE / "venv" / "bin" / "python"
    done = subprocess.run(
        [str(python), "-m", "pytest", "-m", "gpu", "-q", "-o", "addopts=--import-mode=importlib",
         "tests/gpu/test_fused_update.py"],
        cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0 and "18 passed" in done.stdout, done.stdout[-2000:]


def test_the_scripts_run_to_their_end(tmp_path: Path) -> None:
    """Every row of gpu_first has a result but the one that fills host memory, and gpu_train leaves weights."""
    device: dict[str, Any] = {"gib": H200, "name": "NVIDIA H200"}
    listed = on_device("python", "benchmarks/gpu_first.py", "--list", **device).splitlines()
    names = [line.split()[0] for line in listed if not line.startswith("saving")]
    on_device("python", "benchmarks/gpu_first.py", "--patience", "6", "--minutes", "60", "--out", str(tmp_path),
              "--rows", *names, **device)  # fmt: skip
    (file,) = tmp_path.glob("*_gpu-first.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["row"] for row in rows] == names and not [row for row in rows if "failed" in row]
    on_device("python", "tests/null_gpu/gpu_train.py", "--steps", "6", "--batch", "8", "--workers", "1", "--out",
              str(tmp_path), **device)  # fmt: skip
    assert list(tmp_path.glob("*.safetensors"))
