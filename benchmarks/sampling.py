"""What the inference copy gains, and the fast path against the plain one.

    python benchmarks/sampling.py variants [--size b|xs|tiny] [--batch N] [--compile] [--rounds N] [--json F]
    python benchmarks/sampling.py default [--steps 10 20] [--batch N] [--rounds N] [--json F]

variants: random weights, one guided evaluation of `--batch` images in each form: the plain module; conditioning made
         ahead; joined products; with --compile compiled blocks; int8. Every variant is checked against the plain
         module before it is timed, and the variants take turns, so that drift and other load fall on all. `gain` is
         over the variant before, `gain_over_plain` over the first; the time is that of a chain of evaluations,
         planning among it, divided by their number. `cpu_gain` is the same of processor time, which other work on
         the machine moves less.
default: the bundled emoji64-class-xs: 250 ancestral steps of the plain module with both guidance halves at every step,
         against the model's own settings (solver, grid, guidance) on the inference copy at each of `--steps`, in turn.
         Before, latents of the plain module and of the copy are compared at equal steps.

The last line of stdout is one JSON object.
"""

import argparse
import json
import os
import platform
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

import ldit
from ldit.bench.ceiling import device_name, matrix_ceiling
from ldit.bench.sampling import Chain, random_network
from ldit.config.model import ClassModelConfig
from ldit.config.presets import preset
from ldit.diffusion import DDPM
from ldit.diffusion.build import build_process
from ldit.nn.build import forward_flops, parameter_count
from ldit.rng import normal
from ldit.sampling.fast.options import InferenceOptions
from ldit.sampling.fast.prepare import prepare
from ldit.sampling.grids import build_grid

SIZES: dict[str, ClassModelConfig] = {
    "b": preset("B", qk_norm=True),
    "xs": preset("XS", qk_norm=True, patch_size=8, in_channels=3, input_size=64, num_classes=9, rope="2d"),
    "tiny": preset("XS", dim=64, n_layers=2, multiple_of=32, input_size=16, num_classes=9, qk_norm=True),
}
BATCHES = {"b": 2, "xs": 16, "tiny": 2}
EVALUATIONS = {"b": 5, "xs": 20, "tiny": 20}
EXACT = 1e-5  # of the largest value, fp32 in another order through up to 12 blocks
LATENTS = 1e-3  # at equal steps, the acceptance line
PLAIN_STEPS = 250


def noise_of(config: ClassModelConfig, count: int, device: torch.device) -> torch.Tensor:
    shape = (config.in_channels, config.input_size, config.input_size)
    return torch.stack([normal(shape, k, "picture") for k in range(count)]).to(device)


def variants_of(model: nn.Module, compiled: bool, device: torch.device) -> dict[str, Any]:
    found = {
        "plain": model,
        "precomputed": prepare(model, InferenceOptions(packed=False)),
        "packed": prepare(model, InferenceOptions(packed=True)),
    }
    if compiled:
        found["compiled"] = prepare(model, InferenceOptions(compiled=True))
    if device.type == "cuda":
        found["graph"] = prepare(model, InferenceOptions(graph=True, compiled=compiled))
    else:
        found["int8"] = prepare(model, InferenceOptions(int8=True))
    return found


@torch.no_grad()
def compare_variants(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    config, count = SIZES[arguments.size], arguments.batch or BATCHES[arguments.size]
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    evaluations, process = EVALUATIONS[arguments.size], DDPM()
    chain = Chain(
        process, "ddim", build_grid(process, str(evaluations)), tuple(k % config.num_classes for k in range(count)),
        config.num_classes, 4.0, noise_of(config, count, device), config.in_channels,
    )  # fmt: skip
    ceiling = matrix_ceiling(device, dtype)
    assert ceiling is not None
    variants = variants_of(random_network(config, device, dtype), arguments.compile, device)
    x = torch.cat([chain.noise, chain.noise]).to(dtype)
    t = torch.full((len(x),), 500.0, device=device)
    y = torch.tensor([*chain.labels, *[chain.null] * count], device=device)
    expected = variants["plain"](x, t, y).float()
    errors = {name: relative(network(x, t, y).float(), expected) for name, network in variants.items()}
    for name, error in errors.items():
        allowed = 0.05 if name == "int8" else EXACT if dtype == torch.float32 else 2**-5
        print(f"{name}: off by {error:.1e} of the largest value (allowed {allowed:.0e})")
        assert error <= allowed, name
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    busy: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(arguments.rounds + 1):
        for name in sorted(variants, reverse=turn % 2 == 0):
            began = time.process_time()
            taken = chain.run(variants[name], dtype)[2]
            if turn:  # the first warms up
                seconds[name].append(taken / evaluations)
                busy[name].append((time.process_time() - began) / evaluations)
    middle = {name: median(values) for name, values in seconds.items()}
    flops = 2 * count * forward_flops(config, config.input_size, config.input_size)
    before = dict(zip(list(variants)[1:], variants, strict=False)) | {"int8": "packed"}
    rows = {
        name: {
            "ms": 1000 * value,
            "fastest_ms": 1000 * min(seconds[name]),
            "of_ceiling": flops / value / ceiling,
            "difference": errors[name],
            "cpu_ms": 1000 * median(busy[name]),
            **({} if name == "plain" else gains(seconds, name, before[name])),
            **({} if name == "plain" else {f"cpu_{k}": v for k, v in gains(busy, name, before[name]).items()}),
        }
        for name, value in middle.items()
    }
    return {
        "size": arguments.size,
        "parameters": parameter_count(config),
        "tokens": (config.input_size // config.patch_size) ** 2,
        "batch": count,
        "rows": 2 * count,
        "evaluations": evaluations,
        "rounds": arguments.rounds,
        "ceiling_gflops": ceiling / 1e9,
        "variants": rows,
    }


def gains(seconds: dict[str, list[float]], name: str, before: str) -> dict[str, float]:
    """Medians of the rounds' own ratios."""

    def over(other: str) -> float:
        return median(a / b for a, b in zip(seconds[other], seconds[name], strict=True))

    return {"gain": over(before), "gain_over_plain": over("plain")}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
def default(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    pipe = ldit.load("emoji64-class-xs", device)
    config, settings, process = pipe.spec.model, pipe.spec.sampling_defaults, build_process(pipe.spec.process)
    assert isinstance(config, ClassModelConfig) and config.null_class is not None
    count, null = arguments.batch or 16, config.null_class
    noise, labels = noise_of(config, count, device), tuple(k % config.num_classes for k in range(count))
    ours = prepare(pipe.model)

    def made(solver: str, steps: int, interval: tuple[float, float], grid: str = "uniform") -> Chain:
        levels = build_grid(process, str(steps), grid)
        return Chain(process, solver, levels, labels, null, settings.guidance, noise, config.in_channels, interval)

    plain_steps = PLAIN_STEPS if arguments.size != "tiny" else 10
    low, high = settings.guidance_interval
    plain = made("ddpm", plain_steps, (0.0, 1.0))
    fast = {steps: made(settings.solver, steps, (low, high), settings.grid) for steps in arguments.steps}
    differences = {}
    for steps, one in fast.items():
        difference = (one.run(ours, pipe.dtype)[0] - one.run(pipe.model, pipe.dtype)[0]).abs().max().item()
        print(f"{settings.solver}, {steps} steps: latents off by {difference:.1e} (allowed {LATENTS:.0e})")
        assert difference <= LATENTS
        differences[steps] = difference
    times: dict[str, list[float]] = {"plain": [], **{str(steps): [] for steps in fast}}
    counted = {}
    for _ in range(arguments.rounds):
        for name, (network, one) in {
            "plain": (pipe.model, plain),
            **{str(k): (ours, c) for k, c in fast.items()},
        }.items():
            _, guided, taken = one.run(network, pipe.dtype)
            times[name].append(taken)
            counted[name] = guided
    rows = {}
    for steps in fast:
        ratios = [a / b for a, b in zip(times["plain"], times[str(steps)], strict=True)]
        count_of = counted[str(steps)]
        evaluations = counted["plain"].evaluations / count_of.evaluations
        rows[str(steps)] = {
            "seconds": median(times[str(steps)]),
            "evaluations": count_of.evaluations,
            "guided_rows": count_of.guided_rows,
            "wall_ratio": median(ratios),
            "wall_ratio_spread": [min(ratios), max(ratios)],
            "evaluation_ratio": evaluations,
            "share_of_evaluation_ratio": median(ratios) / evaluations,
            "latent_difference": differences[steps],
        }
    return {
        "model": "emoji64-class-xs",
        "solver": settings.solver,
        "grid": settings.grid,
        "guidance": settings.guidance,
        "guidance_interval": [low, high],
        "pictures": count,
        "plain": {"seconds": median(times["plain"]), "evaluations": counted["plain"].evaluations, "steps": plain_steps},
        "fast": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    themes = {"variants": compare_variants, "default": default}
    parser.add_argument("theme", choices=themes)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=SIZES, default="b", help="default: tiny takes 10 plain steps in place of 250")
    parser.add_argument("--batch", type=int, help="images")
    parser.add_argument("--compile", action="store_true", help="a variant of compiled blocks")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file for the result")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    result = themes[arguments.theme](arguments, device)
    report = {
        "benchmark": f"sampling-{arguments.theme}",
        "date": datetime.now(UTC).date().isoformat(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "python": platform.python_version(),
        **result,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(report) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
