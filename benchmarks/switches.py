"""What each switch of training costs in time and memory, against the same network without it.

    python benchmarks/switches.py [--precision fp32] [--rounds 5] [--only NAME …] [--json F]

The network is XS over 16x16 pixels, as wide as a latent model's: 64 tokens, batch 64, random images. Switch and plain
form take turns; the ratio of a round is the switch's time over the plain one's. Memory: the growth of a process of its
own by three steps. The last line of stdout is one JSON object.
"""

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch

import ldit
from ldit.bench.ceiling import device_name, timed
from ldit.bench.train_step import started
from ldit.config.presets import preset
from ldit.config.recipes.registry import diffusion_recipe
from ldit.config.run import RunConfig
from ldit.config.sections import ObjectiveConfig, OptimConfig, StageConfig
from ldit.config.spec import PixelCodecConfig
from ldit.nn.build import forward_flops, parameter_count
from ldit.training.step import train_step
from ldit.training.telemetry import peak_memory

CPU = torch.device("cpu")
BATCH, STEPS = 64, 6


def plain(precision: Any) -> RunConfig:
    config = diffusion_recipe("emoji64-latent-s")
    train = replace(config.train, batch_size=BATCH, precision=precision, warmup=0, steps=1000)
    model = preset("XS", input_size=16, in_channels=3, num_classes=9, learn_sigma=False, qk_norm=True, rope="2d")
    return replace(config, model=model, train=train, codec=PixelCodecConfig())


def _model(**values: Any) -> Callable[[RunConfig], RunConfig]:
    return lambda config: replace(config, model=replace(config.model, **values))


def _objective(**values: Any) -> Callable[[RunConfig], RunConfig]:
    return lambda config: replace(config, objective=ObjectiveConfig(**values))


def _optim(**values: Any) -> Callable[[RunConfig], RunConfig]:
    return lambda config: replace(config, optim=OptimConfig(**values))


def _augment(config: RunConfig) -> RunConfig:
    return _objective(augment=0.15)(_model(augment_labels=True)(config))


SWITCHES: dict[str, Callable[[RunConfig], RunConfig]] = {
    "muon": _optim(kind="muon", precision="bf16"),
    "muon chunked": _optim(kind="muon", chunked=True, precision="bf16"),
    "muon chunked, every 4": _optim(kind="muon", chunked=True, every=4, precision="bf16"),
    "muP rates": _optim(base_width=128),
    "16 class tokens": _model(class_tokens=16),
    "shared adaLN": _model(shared_adaln=True),
    "two patch levels (2 of 6)": _model(fine_layers=2),
    "second head": _model(mid_layer=2),
    "value residual": _model(value_residual=True),
    "q/k norm a head": _model(qk_norm="head"),
    "nearest of 4": _objective(nearest_of=4),
    "min-SNR": _objective(min_snr=5.0),
    "direction": _objective(direction=0.5),
    "dropout": _objective(dropout=0.1),
    "route half of blocks 2-5": _objective(route=0.5, route_blocks=(2, 5)),
    "augment": _augment,
    "stage at half the side": lambda config: replace(config, stages=(StageConfig(config.model.input_size // 2, 500),)),
}


def steps_of(config: RunConfig) -> Callable[[], None]:
    state, task, batch = started(config, CPU)

    def run() -> None:
        for _ in range(STEPS):
            train_step(state, task, batch)

    run()
    return run


def memory_of(config: RunConfig) -> int:
    before = peak_memory(CPU)
    state, task, batch = started(config, CPU)
    for _ in range(3):
        train_step(state, task, batch)
    return peak_memory(CPU) - before


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=list(SWITCHES), choices=SWITCHES)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    base = plain(args.precision)
    if args.memory_of is not None:
        print(memory_of(SWITCHES[args.memory_of](base) if args.memory_of else base))
        return 0

    def memory(name: str) -> int:
        command = [sys.executable, __file__, "--precision", args.precision, "--memory-of", name]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])

    # Memory first: a process begins with the peak of the one that starts it, which must be small.
    memories = {name: memory(name) for name in ("", *args.only)}
    plain_run = steps_of(base)
    side, rows = base.model.input_size, []
    for name in args.only:
        config = SWITCHES[name](base)
        run = steps_of(config)
        ratios = []
        for _ in range(args.rounds):
            ours = timed(run, CPU)
            ratios.append(ours / timed(plain_run, CPU))
        sides = config.stages[0].size if config.stages else side
        rows.append(
            {
                "switch": name,
                "time": round(median(ratios), 3),
                "all": [round(ratio, 3) for ratio in ratios],
                "memory": round(memories[name] / memories[""], 3),
                "flops": round(forward_flops(config.model, sides, sides) / forward_flops(base.model, side, side), 3),
                "parameters": round(parameter_count(config.model) / parameter_count(base.model), 3),
            }
        )
        print(rows[-1], flush=True)
    result = {
        "benchmark": "switches", "precision": args.precision, "batch": BATCH, "rounds": args.rounds,
        "device": device_name(CPU), "plain_memory": memories[""], "rows": rows,
        "versions": {"ldit": ldit.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "date": datetime.now(UTC).date().isoformat(),
    }  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(result) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
