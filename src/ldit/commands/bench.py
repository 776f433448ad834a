"""`ldit bench`: measures speed and memory, and reports them as JSON."""

import json
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from ldit.bench.sampling import bench_sample
from ldit.bench.train_step import bench_train, check_report
from ldit.config.requests.bench import BenchSampleRequest, BenchTrainRequest
from ldit.errors import ConfigError
from ldit.log import setup
from ldit.readable import size, table
from ldit.storage.outputs import put

R = TypeVar("R", BenchTrainRequest, BenchSampleRequest)


def run_train(request: BenchTrainRequest) -> int:
    """`ldit bench train`."""
    if request.micro is not None and (request.micro < 1 or request.batch % request.micro):
        raise ConfigError(f"--micro: {request.micro} does not divide the batch {request.batch}")
    return _run(request, bench_train)


def run_sample(request: BenchSampleRequest) -> int:
    """`ldit bench sample`."""
    return _run(request, bench_sample)


def _run(request: R, measure: Callable[[R], dict[str, Any]]) -> int:
    for name in ("batch", "steps", "rounds"):
        value = getattr(request, name)
        least = min(value, default=0) if isinstance(value, tuple) else value
        if least < 1:
            raise ConfigError(f"--{name}: must be at least 1, got {least}")
    if request.json is not None:
        check_report(request.json)
    setup()
    measured = measure(request)
    report = json.dumps(measured)
    print(_table(measured), file=sys.stderr)
    print(report, flush=True)  # first, because writing the file may fail
    if request.json is not None:
        put(request.json, report + "\n")
    return 0


def _table(report: dict[str, Any]) -> str:
    """The measured rows for people: what, images/s with their range, share of the matrix ceiling, memory."""
    rows = [["", "images/s", "range", "of the ceiling", "memory"]]
    for row in report.get("variants") or report.get("rows", ()):
        name = row.get("name") or f"batch {row['batch']}"
        if not row["fits"]:
            rows.append([name, "does not fit", "", "", ""])
            continue
        low, high = row.get("spread") or (row["images_per_second"],) * 2
        ceiling = f"{100 * row['of_ceiling']:.1f} %" if row.get("of_ceiling") else ""
        rows.append(
            [
                name,
                f"{row['images_per_second']:.4g}",
                f"{low:.4g} to {high:.4g}",
                ceiling,
                size(row.get("peak_bytes", 0)),
            ]
        )
    return table(rows)
