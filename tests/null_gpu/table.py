"""The tables of docs/performance.md: `LDIT_NULL_GPU=DIR python tests/null_gpu/table.py`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CARD, H200 = "79.1", "139.8"  # GiB: 84.9 and 150.1 GB
ONE_CARD = [
    ("3B, AdamW, moments fp32", "3b", 32, "", H200),
    ("3B, AdamW, moments bf16", "3b", 32, "--moments bf16", CARD),
    ("3B, AdamW, moments int8, EMA on the host", "3b", 32, "--moments int8 --ema-host", CARD),
    ("3B, Muon", "3b", 32, "--optimizer muon", CARD),
    ("7B, AdamW, moments bf16", "7b", 32, "--moments bf16", H200),
    ("7B, AdamW, moments int8, EMA on the host", "7b", 16, "--moments int8 --ema-host", CARD),
    ("7B, Muon", "7b", 16, "--optimizer muon", H200),
]
EIGHT_CARDS = [
    ("600M, local batch 32", "600m", "--local 32"),
    ("3B, local batch 32", "3b", "--local 32"),
    ("7B, local batch 64, micro 32", "7b", "--local 64 --micro 32"),
    ("7B, the same, selective recomputation", "7b", "--local 64 --micro 32 --recompute selective"),
]


def row(size: str, options: str, gib: str) -> dict[str, Any]:
    command = [f"{os.environ['LDIT_NULL_GPU']}/run", "python", "tests/null_gpu/steps.py", "--recipe",
               f"imagenet256-{size}", *options.split()]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "NULL_GB": gib, "NULL_NAME": "NVIDIA H100 80GB HBM3"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    print("| one GPU, full recomputation | images | state | peak | reserved | launches a step |")
    print("|---|---|---|---|---|---|")
    for what, size, local, options, gib in ONE_CARD:
        r = row(size, f"--local {local} --recompute full {options}", gib)
        print(f"| {what} | {local} | {r['state_gb']:.1f} GB | {r['peak_gb']:.1f} GB | {r['reserved_gb']:.1f} GB | "
              f"{r['launches']:,} |", flush=True)  # fmt: skip
    print("\n| eight GPUs (FSDP2) | eager: peak | reserved | launches | compiled: peak | reserved | launches |")
    print("|---|---|---|---|---|---|---|")
    for what, size, options in EIGHT_CARDS:
        cells = []
        for form in ("--eager", ""):
            r = row(size, f"{options} --world 8 {form}", CARD)
            cells += [f"{r['peak_gb']:.1f} GB", f"{r['reserved_gb']:.1f} GB", f"{r['launches']:,}"]
        print(f"| {what} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
