"""One forward pass of ldit's class model against the plain eager form in `plain_dit.py`, same weights, one process.

    python benchmarks/forward.py [--device cpu|cuda] [--size s|tiny] [--rounds 3] [--json FILE]

Order of work: outputs must agree to 1e-5 of the largest value (exit 1 otherwise); the machine's own fp32 matrix rate is
measured, so that numbers from different machines can be read; then both networks run in turn, the first of each pair
alternating, so that drift and other load fall on both. `ratio` = median plain / median ours: 1.0 or more means that
ours is at least as fast. `ratio_fastest` compares the fastest forwards, which other load disturbs least. On a CPU with
other work, set OMP_WAIT_POLICY=passive: threads that spin for a descheduled one make times jump fivefold. The last
line of stdout is one JSON object.
"""

import argparse
import json
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from plain_dit import PlainDiT
from torch import Tensor, nn

import ldit
from ldit.bench.ceiling import device_name, matrix_ceiling, timed
from ldit.config.model import ClassModelConfig
from ldit.nn.build import build_model, forward_flops, parameter_count
from ldit.nn.dit import init_weights
from ldit.rng import generator, normal

TOLERANCE = 1e-5
THREADS = 2
# size: (configuration, batch, forwards of each network in a round)
SIZES: dict[str, tuple[ClassModelConfig, int, int]] = {
    "s": (ClassModelConfig(dim=384, n_layers=12, n_heads=6, qk_norm=True), 8, 4),
    "tiny": (ClassModelConfig(dim=64, n_layers=2, n_heads=2, multiple_of=32, input_size=16, qk_norm=True), 2, 10),
}


def build_pair(config: ClassModelConfig, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """(plain, ours) with the same random weights; what starts at zero is drawn too, or every block would be skipped."""
    ours = build_model(config)
    init_weights(ours, lambda name: generator(0, "weights", 0, name))
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if not p.any():
                p.normal_(0.0, 0.02, generator=generator(0, "zeros", 0, name))
    plain = PlainDiT(config)
    plain.load_state_dict(ours.state_dict())
    return tuple(m.to(device).eval().requires_grad_(False) for m in (plain, ours))  # type: ignore[return-value]


def inputs(config: ClassModelConfig, batch: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    x = normal((batch, config.in_channels, config.input_size, config.input_size), 0, "bench")
    t = torch.linspace(0, 999, batch).round()
    y = torch.arange(batch) * 37 % (config.num_classes + 1)
    return x.to(device), t.to(device), y.to(device)


def measure(
    plain: nn.Module, ours: nn.Module, arguments: tuple[Tensor, Tensor, Tensor], rounds: int, repeats: int
) -> tuple[dict[str, list[list[float]]], list[float]]:
    """Seconds by network, round and forward; and the ratio plain / ours of each round's medians."""
    device = arguments[0].device
    networks = {"plain": plain, "ours": ours}
    seconds: dict[str, list[list[float]]] = {name: [] for name in networks}
    for _ in range(rounds):
        for times in seconds.values():
            times.append([])
        for i in range(repeats):
            for name in sorted(networks, reverse=i % 2 == 0):
                network = networks[name]
                seconds[name][-1].append(timed(lambda network=network: network(*arguments), device))  # type: ignore[misc]
    ratios = [median(a) / median(b) for a, b in zip(seconds["plain"], seconds["ours"], strict=True)]
    return seconds, ratios


def report(size: str, device: torch.device, rounds: int) -> dict[str, Any]:
    config, batch, repeats = SIZES[size]
    plain, ours = build_pair(config, device)
    arguments = inputs(config, batch, device)
    with torch.inference_mode():
        expected, got = plain(*arguments), ours(*arguments)
        difference = float((got - expected).abs().max() / expected.abs().max())
        result: dict[str, Any] = {
            "benchmark": "forward",
            "date": datetime.now(UTC).date().isoformat(),
            "versions": {"ldit": ldit.__version__, "torch": torch.__version__, "python": platform.python_version()},
            "hardware": device_name(device),
            "device": device.type,
            "threads": torch.get_num_threads(),
            "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
            "load_average": round(os.getloadavg()[0], 2),
            "dtype": "float32",
            "size": size,
            "batch": batch,
            "tokens": (config.input_size // config.patch_size) ** 2,
            "parameters": parameter_count(config),
            "flops": batch * forward_flops(config, config.input_size, config.input_size),
            "relative_difference": difference,
            "equal": difference <= TOLERANCE,
        }
        print(f"largest difference: {difference:.1e} of the largest value (allowed {TOLERANCE:.0e})")
        if not result["equal"]:
            return result
        ceiling = (matrix_ceiling(device, torch.float32) or 0.0) / 1e9
        print(f"matrix ceiling, fp32: {ceiling:.1f} GFLOP/s on {result['hardware']}")
        seconds, ratios = measure(plain, ours, arguments, rounds, repeats)
    for i, ratio in enumerate(ratios):
        shown = ", ".join(_summary(name, rows[i]) for name, rows in seconds.items())
        print(f"round {i + 1}: {shown}; ratio {ratio:.3f}")
    every = {name: [t for times in rows for t in times] for name, rows in seconds.items()}
    middle = {name: median(times) for name, times in every.items()}
    result |= {
        "gemm_gflops": round(ceiling, 1),
        "rounds_ms": {
            name: [{"median": _ms(median(t)), "min": _ms(min(t)), "max": _ms(max(t))} for t in rows]
            for name, rows in seconds.items()
        },
        "median_ms": {name: _ms(value) for name, value in middle.items()},
        "gflops": {name: round(result["flops"] / value / 1e9, 1) for name, value in middle.items()},
        "of_ceiling": {name: round(result["flops"] / value / 1e9 / ceiling, 3) for name, value in middle.items()},
        "round_ratios": [round(ratio, 3) for ratio in ratios],
        "ratio_fastest": round(min(every["plain"]) / min(every["ours"]), 3),
        "ratio": round(middle["plain"] / middle["ours"], 3),
    }
    return result


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


def _summary(name: str, times: list[float]) -> str:
    return f"{name} {_ms(median(times)):.1f} ms ({_ms(min(times)):.1f}-{_ms(max(times)):.1f})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=tuple(SIZES), default="s", help="s: 384 wide, 12 layers; tiny: for CI")
    parser.add_argument("--rounds", type=int, default=3, help="at least 3 for numbers worth keeping")
    parser.add_argument("--json", type=Path, help="write the result here too")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds: must be at least 1")
    torch.set_num_threads(THREADS)
    torch.set_float32_matmul_precision("highest")
    result = report(args.size, torch.device(args.device), args.rounds)
    if "ratio" in result:
        print(f"ratio plain / ours: {result['ratio']:.3f} (fastest forwards {result['ratio_fastest']:.3f})")
    else:
        print("outputs differ; nothing was timed", file=sys.stderr)
    text = json.dumps(result)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0 if result["equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
