"""Trains the bundled class model's recipe on a GPU for the minutes that there are, and keeps the weights.

A short trial measures the speed; then the run is as long as fits, its cool-down included. Kept: the EMA weights in bf16
(16 MB), the metrics, and the last sample grid. `benchmarks/gpu_train.sh` runs it.
"""

import argparse
import json
import logging
import shutil
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import ldit
from ldit.commands.convert import convert
from ldit.config.recipes.registry import diffusion_recipe
from ldit.config.run import RunConfig

ROOT = Path(__file__).resolve().parents[1]
TRIAL = 120  # steps; their first half compiles and fills the caches
RESERVED = 40.0  # seconds for the start, the last checkpoint and the export


def configured(name: str, batch: int, workers: int, steps: int) -> RunConfig:
    """The recipe at another batch size, its rate scaled by the root of the batch's, in bf16."""
    config = diffusion_recipe(name)
    train = config.train
    rate = train.lr * (batch / train.batch_size) ** 0.5
    return replace(
        config,
        data=replace(config.data, workers=workers),
        heldout=replace(config.heldout, every=max(steps // 20, 10), num=1024),
        train=replace(
            train, steps=steps, batch_size=batch, lr=rate, precision="bf16", warmup=min(400, steps // 5),
            cooldown=steps // 5, log_every=max(steps // 200, 10), checkpoint_every=max(steps // 10, 10),
            sample_every=max(steps // 5, 10), attention_every=0,
        ),
    )  # fmt: skip


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--recipe", default="emoji64-class-xs")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--workers", type=int, default=12, help="threads that read images")
    parser.add_argument("--steps", type=int, help="instead of as many as fit")
    parser.add_argument("--out", type=Path, help="folder for weights, metrics and samples")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    began = time.perf_counter()
    day = datetime.now(UTC).date().isoformat()
    out = arguments.out or ROOT / "benchmarks" / "results"
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        steps = arguments.steps
        rate = None
        if steps is None:
            # The trial's last log line is of its second half alone.
            trial = configured(arguments.recipe, arguments.batch, arguments.workers, TRIAL)
            trial = replace(trial, train=replace(trial.train, log_every=TRIAL // 2, sample_every=0, cooldown=0))
            trial = replace(trial, heldout=replace(trial.heldout, every=0))
            ldit.train(trial, Path(place) / "trial")
            rate = records(Path(place) / "trial")[-1]["images_per_second"]
            left = 60 * arguments.minutes - (time.perf_counter() - began) - RESERVED
            steps = max(int(0.9 * left * rate / arguments.batch), TRIAL)
        run = Path(place) / "run"
        ldit.train(configured(arguments.recipe, arguments.batch, arguments.workers, steps), run)
        # What is kept.
        stem = f"{day}_gpu-{arguments.recipe}"
        export = convert(run, Path(place) / "export", dtype="bf16", ema_only=True)
        for file in export.iterdir():
            if file.suffix == ".safetensors" or file.name == "config.json":
                shutil.copy(file, out / f"{stem}{'.json' if file.suffix == '.json' else file.suffix}")
        shutil.copy(run / "metrics.jsonl", out / f"{stem}_metrics.jsonl")
        for picture in sorted((run / "samples").glob("*.png"))[-1:]:
            shutil.copy(picture, out / f"{stem}.png")
        found = [record for record in records(run) if "eps_mse" in record]
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        report = {
            "benchmark": "gpu-train", "date": day, "device": name, "torch": torch.__version__,
            "recipe": arguments.recipe, "steps": steps, "batch": arguments.batch, "trial_images_per_second": rate,
            "heldout": found[-1]["eps_mse"] if found else None, "seconds": time.perf_counter() - began,
        }  # fmt: skip
    (out / f"{stem}_report.json").write_text(json.dumps(report) + "\n", encoding="utf-8")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
