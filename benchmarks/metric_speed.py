"""Precision and recall, the kernel distance and the statistics against plain formulas, in paired rounds.

    python benchmarks/metric_speed.py [--rows 10000] [--width 2048] [--rounds 15] [--json F]

Each is computed by us and by its formula written down with numpy or torch as other evaluation packages do: distances by
`torch.cdist` with `kthvalue`, kernels of float32 rows by numpy, and `numpy.mean` with `numpy.cov`. A round times both,
in alternating order. Both results are printed; those of the kernel distance are of other subsets, so its error is
measured by itself, against float64 on the same rows. The last line of stdout is one JSON object.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldit.bench.ceiling import device_name
from ldit.eval.metrics.kernel import SUBSET_SIZE, SUBSETS, kernel_distance
from ldit.eval.metrics.moments import Moments
from ldit.eval.metrics.neighbours import NEIGHBOURS, precision_recall


def features(rows: int, width: int, seed: int) -> Tensor:
    """(rows, width) float32 that are not negative, of 64 directions and noise, as pooled features of a network are."""
    drawn = torch.Generator().manual_seed(seed)
    directions = torch.randn(64, width, generator=torch.Generator().manual_seed(0))
    mixed = torch.randn(rows, 64, generator=drawn) @ directions * 0.05
    return (mixed + 0.2 * torch.randn(rows, width, generator=drawn)).relu_() + 0.1 * torch.rand(
        rows, width, generator=drawn
    )


def our_precision_recall(samples: Tensor, references: Tensor) -> tuple[float, float]:
    found = precision_recall(samples, references)
    return found.precision, found.recall


def plain_precision_recall(samples: Tensor, references: Tensor) -> tuple[float, float]:
    radii, own_radii = (
        torch.cdist(rows, rows).kthvalue(NEIGHBOURS + 1, dim=1).values for rows in (references, samples)
    )
    between = torch.cdist(samples, references)
    precision = (between <= radii).any(dim=1).float().mean().item()
    return precision, (between <= own_radii[:, None]).any(dim=0).float().mean().item()


def our_kernel_distance(samples: Tensor, references: Tensor) -> tuple[float, float]:
    found = kernel_distance(samples, references)
    return found.mean, found.deviation


def plain_kernel_distance(samples: Tensor, references: Tensor) -> tuple[float, float]:
    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (np.matmul(a, b.T) / a.shape[1] + 1) ** 3

    draw, estimates = np.random.default_rng(0), []
    for _ in range(SUBSETS):
        x, y = (rows.numpy()[draw.choice(len(rows), SUBSET_SIZE, replace=False)] for rows in (samples, references))
        own, other = kernel(x, x), kernel(y, y)
        size = len(x)
        within = own.sum() - np.trace(own) + other.sum() - np.trace(other)
        estimates.append(within / (size * (size - 1)) - 2 * kernel(x, y).mean())
    return float(np.mean(estimates)), float(np.std(estimates))


def our_statistics(samples: Tensor, _: Tensor) -> tuple[float, float]:
    found = Moments(samples.shape[1])
    found.add(samples)
    return float(found.mean.sum()), float(found.covariance.trace())


def plain_statistics(samples: Tensor, _: Tensor) -> tuple[float, float]:
    rows = samples.numpy()
    return float(np.mean(rows, axis=0).sum()), float(np.trace(np.cov(rows, rowvar=False)))


def kernel_errors(samples: Tensor, references: Tensor) -> dict[str, float]:
    """The largest difference of both to float64, over subsets of consecutive rows."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1.0) ** 3

    def estimate(x: Tensor, y: Tensor) -> float:
        own, other, size = kernel(x, x), kernel(y, y), len(x)
        within = own.sum() - own.diagonal().sum() + other.sum() - other.diagonal().sum()
        return float(within / (size * (size - 1)) - 2.0 * kernel(x, y).mean())

    ours, plain = [], []
    for first in range(0, len(samples), SUBSET_SIZE):
        x, y = samples[first : first + SUBSET_SIZE], references[first : first + SUBSET_SIZE]
        for moved in (x, x + 0.3):  # also a set that is far from the references
            exact = estimate(moved.double(), y.double())
            ours.append(abs(kernel_distance(moved, y).mean - exact))
            plain.append(abs(estimate(moved, y) - exact))
    return {"error_of_ours": max(ours), "error_of_float32": max(plain)}


Metric = Callable[[Tensor, Tensor], tuple[float, float]]
METRICS: dict[str, tuple[Metric, Metric]] = {
    "precision and recall": (our_precision_recall, plain_precision_recall),
    "kernel distance": (our_kernel_distance, plain_kernel_distance),
    "statistics": (our_statistics, plain_statistics),
}


def compared(name: str, samples: Tensor, references: Tensor, rounds: int) -> dict[str, Any]:
    seconds: tuple[list[float], list[float]] = ([], [])
    results: list[tuple[float, float]] = [(0.0, 0.0), (0.0, 0.0)]
    for number in range(rounds + 1):
        for which in (0, 1) if number % 2 else (1, 0):
            began = time.perf_counter()
            results[which] = METRICS[name][which](samples, references)
            if number:  # the first round warms up
                seconds[which].append(time.perf_counter() - began)
    ratios = sorted(plain / ours for ours, plain in zip(*seconds, strict=True))
    row = {
        "ours_s": round(median(seconds[0]), 3),
        "plain_s": round(median(seconds[1]), 3),
        "times_faster": round(median(ratios), 3),
        "least": round(ratios[0], 3),
        "most": round(ratios[-1], 3),
        "ours": results[0],
        "plain": results[1],
    }
    print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    samples, references = (features(arguments.rows, arguments.width, seed) for seed in (1, 2))
    report: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "device": device_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "rows": arguments.rows,
        "width": arguments.width,
        "rounds": arguments.rounds,
        "metrics": {name: compared(name, samples, references, arguments.rounds) for name in METRICS},
        "kernel distance": kernel_errors(samples, references),
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
