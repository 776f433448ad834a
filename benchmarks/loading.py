"""Opening a model folder of ours against safetensors alone, with every weight read once.

    python benchmarks/loading.py --work FOLDER [--size 600m] [--rounds 10] [--json F]

A folder with random weights is written into FOLDER. Each round opens it by safetensors and `load_state_dict`, by us
with nothing remembered (first), by us again (second), and by safetensors. The last line of stdout is one JSON object.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

import ldit
from ldit.bench.ceiling import device_name
from ldit.checkpoint import export
from ldit.checkpoint.open import open_source
from ldit.config.recipes.registry import diffusion_recipe
from ldit.config.spec import ModelSpec
from ldit.nn.build import build_model
from ldit.pipeline.load import load_model
from ldit.storage.atomic import committed
from ldit.storage.verified import cache_folder

RECIPES = {"600m": "imagenet256-600m", "3b": "imagenet256-3b", "tiny": "tiny-cpu"}


def write(folder: Path, recipe: str) -> None:
    config = diffusion_recipe(recipe)
    model = build_model(config.model, "meta").to_empty(device="cpu").requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(0, 0.02)
    with committed(folder) as temporary:
        spec = ModelSpec(config.model, config.process, config.codec)
        export.write_export(temporary, spec, model.state_dict().items())


def seconds(opened: Callable[[], nn.Module]) -> float:
    """Seconds to open and to read every weight."""
    began = time.perf_counter()
    with torch.no_grad():
        sum(float(parameter.sum()) for parameter in opened().parameters())
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--size", choices=tuple(RECIPES), default="600m")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    folder = args.work / f"model-{args.size}"
    os.environ["XDG_CACHE_HOME"] = str(args.work / "cache")
    if not folder.exists():
        write(folder, RECIPES[args.size])
        time.sleep(1.0)  # a file just written is not remembered
    config = open_source(folder).spec.model

    def plain() -> nn.Module:
        with torch.device("meta"):
            model = build_model(config, "meta")
        model.load_state_dict(load_file(folder / "model.safetensors"), assign=True)
        return model

    def ours() -> nn.Module:
        return load_model(open_source(folder))

    seconds(plain), seconds(ours)
    rounds: dict[str, list[float]] = {"plain": [], "first": [], "second": [], "plain again": []}
    for _ in range(args.rounds):
        (cache_folder() / "verified.json").unlink(missing_ok=True)
        for name, opened in zip(rounds, (plain, ours, ours, plain), strict=True):
            rounds[name].append(seconds(opened))
    first = [a / b for a, b in zip(rounds["first"], rounds["plain"], strict=True)]
    second = [a / b for a, b in zip(rounds["second"], rounds["plain again"], strict=True)]
    report: dict[str, Any] = {
        "benchmark": "loading",
        "date": datetime.now(UTC).date().isoformat(),
        "device": device_name(torch.device("cpu")),
        "versions": {"ldit": ldit.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "size": args.size,
        "bytes": (folder / "model.safetensors").stat().st_size,
        "seconds": rounds,
        "ratio": {name: [median(x), min(x), max(x)] for name, x in (("first", first), ("second", second))},
    }
    text = json.dumps(report)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")
    for name, (middle, low, high) in report["ratio"].items():
        print(f"{name}: {middle:.2f} times safetensors alone ({low:.2f} to {high:.2f})")
    print(text)


if __name__ == "__main__":
    main()
