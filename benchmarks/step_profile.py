"""Where the time of a training step goes, against what its matrix products alone would take.

    python benchmarks/step_profile.py [--size S] [--batch 8] [--precision fp32] [--rounds 7] [--compile] [--json F]

Large-DiT and the original DiT of one size with patches of 2, on latents of 32 x 32 x 4. Each step is timed, and traced
once. Every product of the trace is then computed alone, at its shapes, and so is attention: their sum is the floor of
the step on this machine. The rest are passes over memory. --compile also times steps with compiled blocks, in turn with
the others. The last line of stdout is one JSON object.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

import ldit
from ldit.bench.ceiling import device_name, matrix_ceiling
from ldit.bench.train_step import bench_config, started, step_of
from ldit.config.model import ModelConfig
from ldit.config.presets import original_dit, preset
from ldit.config.spec import DDPMConfig
from ldit.nn.build import forward_flops
from ldit.precision import COMPUTE, products

CPU = torch.device("cpu")
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"
SHOWN = 8


def models(size: str) -> dict[str, ModelConfig]:
    return {
        "large-dit": preset(size, input_size=32, qk_norm=True),
        "dit": original_dit(size, input_size=32, patch_size=2, in_channels=4, num_classes=1000),
    }


def best(call: Callable[[], object], repeats: int = 3) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


def alone(key: str, shapes: list[list[int]], dtype: torch.dtype) -> float:
    """Seconds of one product (fp32 sums are in the bias of addmm) or attention at the shapes, by itself."""
    if key.startswith(ATTENTION):
        q, k, v = (torch.randn(shape, dtype=dtype) for shape in shapes)
        if not key.endswith("backward"):
            return best(lambda: F.scaled_dot_product_attention(q, k, v))
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v)
        grad = torch.randn_like(out)
        return best(lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True))
    a, b = (torch.randn(shape, dtype=dtype) for shape in shapes)
    return best(lambda: a @ b)


def traced(step: Callable[[], float], dtype: torch.dtype) -> dict[str, Any]:
    """Seconds of the products and of attention in the step and alone, and of the largest of the other operations."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as trace:
        step()
    inside = floor = 0.0
    others: dict[str, float] = {}
    for event in trace.key_averages(group_by_input_shape=True):
        seconds = event.self_cpu_time_total / 1e6
        if event.key in PRODUCTS:
            shapes = (
                event.input_shapes[1:3] if event.key in ("aten::addmm", "aten::baddbmm") else event.input_shapes[:2]
            )
            inside, floor = inside + seconds, floor + event.count * alone(event.key, shapes, dtype)
        elif event.key.startswith(ATTENTION):
            first = 1 if event.key.endswith("backward") else 0  # the gradient comes first
            shapes = event.input_shapes[first : first + 3]
            inside, floor = inside + seconds, floor + event.count * alone(event.key, shapes, dtype)
        else:
            others[event.key] = others.get(event.key, 0.0) + seconds
    largest = sorted(others.items(), key=lambda item: -item[1])[:SHOWN]
    return {
        "products_s": round(inside, 4),
        "products_alone_s": round(floor, 4),
        "others_s": round(sum(others.values()), 4),
        "largest_others_s": {name.removeprefix("aten::"): round(seconds, 4) for name, seconds in largest},
    }


def measured(model: ModelConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    """Eager (and compiled) steps in turn, and the trace of an eager one."""
    config = bench_config("imagenet256-600m", arguments.batch, arguments.precision)
    config = replace(config, model=model, process=DDPMConfig())
    steps = {}
    for name in ("eager", "compiled") if arguments.compile else ("eager",):
        run = replace(config, parallel=replace(config.parallel, compile=name == "compiled"))
        steps[name] = step_of("fused", *started(run, CPU))
        steps[name](), steps[name]()  # compiles, and creates the optimiser's state
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(arguments.rounds):
        for name, step in steps.items():
            seconds[name].append(best(step, 1))
    flops = 3.0 * arguments.batch * forward_flops(model, 32, 32)
    found: dict[str, Any] = {
        "step_s": {name: round(median(times), 4) for name, times in seconds.items()},
        "flops": flops,
    }
    found |= {"range_s": {name: [round(min(times), 4), round(max(times), 4)] for name, times in seconds.items()}}
    if arguments.compile:
        found["compiled_times_faster"] = round(median(a / b for a, b in zip(*seconds.values(), strict=True)), 3)
    found |= traced(steps["eager"], COMPUTE[arguments.precision])
    found["flop_per_s"] = {name: flops / value for name, value in found["step_s"].items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="S", choices=("S", "B", "L"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    report: dict[str, Any] = {
        "benchmark": "step_profile",
        "date": datetime.now(UTC).date().isoformat(),
        "device": device_name(CPU),
        "threads": torch.get_num_threads(),
        "versions": {"ldit": ldit.__version__, "torch": torch.__version__, "python": platform.python_version()},
        **{key: getattr(arguments, key) for key in ("size", "batch", "precision", "rounds")},
        "ceiling_flop_per_s": matrix_ceiling(CPU, COMPUTE[arguments.precision]),
    }
    with products(arguments.precision):
        for name, model in models(arguments.size).items():
            report[name] = measured(model, arguments)
            print(name, json.dumps(report[name], indent=1), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
