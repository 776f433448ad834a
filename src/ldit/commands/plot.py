"""`ldit plot`: curves of runs from their metrics.jsonl as one PNG. Imports no torch."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldit.commands.curves import Curve, Panel, draw
from ldit.config.requests.plot import PlotRequest, XAxis
from ldit.errors import RequestError, SourceError
from ldit.storage.manifest import check_not_in_checkpoint
from ldit.storage.names import METRICS
from ldit.track import numbers

DEFAULT_KEYS = ("loss", "eps_mse", "grad_norm", "lr", "images_per_second")
EXACT = ("lr",)  # without noise, so a mean would only round its corners
FEW = 20  # values of one key, such as held-out losses, that are drawn as they are
NEGLIGIBLE = 1e-3  # weight below which a neighbour does not count


@dataclass(frozen=True)
class Metrics:
    """One metrics.jsonl: `steps[i]` and `values[i]` are of one line; null and non-finite values are NaN."""

    path: Path
    steps: list[int]
    values: list[dict[str, float]]

    def names(self) -> list[str]:
        return list(dict.fromkeys(name for line in self.values for name in line))


def run(request: PlotRequest) -> int:
    """`ldit plot`."""
    print(plot(request))
    return 0


def plot(job: PlotRequest) -> Path:
    """Write the PNG and return its path. SourceError or RequestError when there is nothing to draw."""
    if not job.runs:
        raise RequestError("ldit plot needs a run (a directory or a metrics.jsonl file)")
    if job.out.suffix.lower() != ".png":
        raise RequestError(f"--out: expected a name that ends in .png, got {job.out}")
    if not 0 <= job.smooth < 1:
        raise RequestError(f"--smooth: must be in [0, 1), got {job.smooth}")
    check_not_in_checkpoint(job.out)
    runs = [read_metrics(_metrics_file(source)) for source in job.runs]
    keys = _keys(runs, job.keys)
    axes = [_positions(run, job.x) for run in runs]
    panels = [
        Panel(key, tuple(_curve(i, axes[i], run, key, job) for i, run in enumerate(runs) if key in run.names()))
        for key in keys
    ]
    draw(panels, _run_names(job.runs), job.x, job.log_y).save(job.out, "PNG")
    return job.out


def read_metrics(path: Path) -> Metrics:
    """Every line of a metrics.jsonl. A damaged line is a SourceError that names it, unless it is the last one: the
    line in which a run died."""
    lines = path.read_bytes().splitlines()
    steps: list[int] = []
    values: list[dict[str, float]] = []
    for number, line in enumerate(lines, 1):
        record = _record(line)
        if record is None:
            if number == len(lines):
                break
            raise SourceError(f"{path}:{number}: not a JSON object with an integer step")
        steps.append(record["step"])
        values.append({name: _finite(value) for name, value in numbers(record)})
    if not steps:
        raise SourceError(f"{path}: holds no metrics yet")
    return Metrics(path, steps, values)


def smoothed(values: NDArray[np.float64], weight: float) -> NDArray[np.float64]:
    """Mean of each value and its neighbours on both sides, weighted weight**distance in points.

    values: (N,), NaN = gap; a gap stays one and parts what is averaged. weight in [0, 1), 0 = as it is. Before the
    first gap it reaches no further to the right than to the left: the steep beginning of a curve is not pulled down.
    """
    out = values.copy()
    finite = np.isfinite(values)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], finite, [False]]).astype(np.int8)))
    reach = int(math.log(NEGLIGIBLE) / math.log(weight)) if weight else 0
    for first, end in zip(edges[::2], edges[1::2], strict=True):
        part, count = values[first:end], int(end - first)
        total, share = part.copy(), np.ones_like(part)
        for k in range(1, min(reach, count - 1) + 1):
            total[k:] += weight**k * part[:-k]
            share[k:] += weight**k
            near = 0 if first else k
            if near + k < count:
                total[near : count - k] += weight**k * part[near + k :]
                share[near : count - k] += weight**k
        out[first:end] = total / share
    return out


def _metrics_file(source: Path) -> Path:
    if source.is_dir():
        if not (source / METRICS).is_file():
            raise SourceError(f"{source / METRICS}: no such file, so {source} is not a run or has logged nothing yet")
        return source / METRICS
    if not source.is_file():
        raise SourceError(f"{source}: no such run or {METRICS}")
    return source


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return record if isinstance(step, int) and not isinstance(step, bool) and 0 <= step < 1 << 62 else None


def _finite(value: float | None) -> float:
    """NaN for what cannot be drawn. Differences and ratios of what is left stay within a double's range."""
    if value is None or not abs(value) < 1e150:
        return math.nan
    return value if abs(value) > 1e-150 else 0.0


def _keys(runs: Sequence[Metrics], wanted: Sequence[str]) -> list[str]:
    """The panels; RequestError with the names there are."""
    known = list(dict.fromkeys(name for run in runs for name in run.names()))
    for key in wanted:
        if key not in known:
            raise RequestError(f"--keys: no run has {key!r} (there are: {', '.join(known) or 'none'})")
    keys = list(dict.fromkeys(wanted)) or [key for key in DEFAULT_KEYS if key in known]
    if not keys:
        raise RequestError(f"--keys: choose what to draw (there are: {', '.join(known) or 'none'})")
    return keys


def _positions(run: Metrics, axis: XAxis) -> NDArray[np.float64]:
    """x of every line: steps, images seen, or hours of training as images over the logged images_per_second."""
    steps = np.array(run.steps, dtype=np.float64)
    if axis == "step":
        return steps
    images = steps * _batch_size(run.path.with_name("config.json"), axis)
    if axis == "images":
        return images
    rates = np.array([line.get("images_per_second", math.nan) for line in run.values])
    rates[~(rates > 0)] = math.nan
    if not np.isfinite(rates).any():
        raise RequestError(f"--x hours: {run.path} has no images_per_second")
    known = np.flatnonzero(np.isfinite(rates))
    nearest = known[np.searchsorted(known, np.arange(len(rates))).clip(0, len(known) - 1)]
    return np.cumsum(np.diff(images, prepend=0.0) / rates[nearest]) / 3600


def _batch_size(path: Path, axis: XAxis) -> int:
    """train.batch_size of the run's configuration."""
    if not path.is_file():
        raise SourceError(f"{path}: no such file: --x {axis} needs the batch size of the run")
    try:
        size = json.loads(path.read_bytes())["train"]["batch_size"]
    except (ValueError, KeyError, TypeError, RecursionError):
        size = None
    if not isinstance(size, int) or size < 1:
        raise SourceError(f"{path}: no train.batch_size, which --x {axis} needs")
    return size


def _curve(index: int, x: NDArray[np.float64], run: Metrics, key: str, job: PlotRequest) -> Curve:
    """One key of one run; lines that do not log the key are no gaps. On a log axis values up to 0 are gaps and the
    mean is that of the logarithms, as drawn. Few values are not averaged."""
    at = [i for i, line in enumerate(run.values) if key in line]
    values = np.array([run.values[i][key] for i in at])
    weight = 0.0 if key in EXACT or len(values) < FEW else job.smooth
    if job.log_y:
        values[~(values > 0)] = math.nan
        return Curve(index, x[at], values, np.exp(smoothed(np.log(values), weight)) if weight else values)
    return Curve(index, x[at], values, smoothed(values, weight))


def _run_names(sources: Sequence[Path]) -> list[str]:
    """Names of the folders, or of files with a name of their own; paths as given where two would be the same."""
    names = []
    for source in sources:
        path = source.resolve()
        names.append(path.name if path.is_dir() else path.parent.name if path.name == METRICS else path.stem)
    return [name if names.count(name) == 1 else str(source) for name, source in zip(names, sources, strict=True)]
