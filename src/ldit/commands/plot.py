"""`ldit plot`: plots metrics.jsonl of runs, a panel for each key; imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ldit.config.requests.plot import PlotRequest, XAxis
from ldit.errors import RequestError, SourceError
from ldit.figure import COLOURS, FAINT, check_plotting, figure_bytes, new_figure, shortened, style
from ldit.log import logger
from ldit.storage.names import METRICS
from ldit.storage.outputs import check_target, put
from ldit.track import numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Dashes = Literal["-"] | tuple[float, tuple[float, ...]]  # solid, or (offset, (on, off, …))

DEFAULT_KEYS = ("loss", "eps_mse", "grad_norm", "lr", "images_per_second")
EXACT = ("lr",)  # keys without noise, which are not smoothed
FEW = 20  # keys with fewer values, such as held-out losses, are not smoothed
NEGLIGIBLE = 1e-3  # neighbours with a smaller weight are ignored in smoothing
DASHES: tuple[Dashes, ...] = ("-", (0.0, (4.0, 1.5)), (0.0, (1.0, 1.2)))  # for the first seven runs, the next seven, …


@dataclass(frozen=True)
class Metrics:
    """A metrics.jsonl: `steps[i]` and `values[i]` are from one line; null and non-finite values are NaN."""

    path: Path
    steps: list[int]
    values: list[dict[str, float]]

    def names(self) -> list[str]:
        return list(dict.fromkeys(name for line in self.values for name in line))


@dataclass(frozen=True)
class Curve:
    """One key of run number `run`: x, raw and smoothed values, each (N,); NaN = gap."""

    run: int
    x: NDArray[np.float64]
    raw: NDArray[np.float64]
    smooth: NDArray[np.float64]


@dataclass(frozen=True)
class Panel:
    """The curves of one key."""

    key: str
    curves: tuple[Curve, ...]


def run(request: PlotRequest) -> int:
    """`ldit plot`."""
    print(plot(request))
    return 0


def plot(job: PlotRequest) -> Path:
    """Write the PNG or SVG of `job` and return its path. SourceError or RequestError when there is nothing to draw."""
    # Check the request before anything is read.
    if not job.runs:
        raise RequestError("ldit plot needs a run (a directory or a metrics.jsonl file)")
    if not 0 <= job.smooth < 1:
        raise RequestError(f"--smooth: must be in [0, 1), got {job.smooth}")
    check_plotting(job.out)
    check_target(job.out)
    # Read the runs, choose the keys, and compute the x position of each line.
    runs, names = [read_metrics(_metrics_file(source)) for source in job.runs], _run_names(job.runs)
    keys = _keys(runs, job.keys)
    axes = [_positions(run, job.x) for run in runs]
    if missing := [f"{name}: {key}" for name, run in zip(names, runs, strict=True) for key in _lacking(run, job.keys)]:
        logger.warning("not logged, so not drawn: %s", ", ".join(missing))
    panels = [
        Panel(key, tuple(_curve(i, axes[i], run, key, job) for i, run in enumerate(runs) if key in run.names()))
        for key in keys
    ]
    # Draw.
    figure = draw(panels, names, job.x, job.log_y)
    put(job.out, figure_bytes(figure, job.out.suffix[1:].lower()))
    return job.out


@style()
def draw(panels: Sequence[Panel], runs: Sequence[str], x_label: str, log_y: bool) -> Figure:
    """The legend of all `runs` at the top, then a panel for each key, two in a row. `panels` is not empty."""
    from matplotlib.lines import Line2D

    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    width, height = (10.8, 3.0 * rows) if columns > 1 else (8.4, 4.6)
    # The longest name decides how many legend entries fit in a row; the figure grows by the legend's rows.
    characters = int(width / 0.085)
    labels = [shortened(name, characters - 8) for name in runs]
    in_a_row = min(len(labels), characters // (max(map(len, labels)) + 8))
    figure = new_figure(width, height + 0.26 * -(-len(labels) // in_a_row))
    lines = [Line2D([], [], color=c, linestyle=d, linewidth=2.5) for c, d in map(_look, range(len(labels)))]
    figure.legend(lines, labels, loc="outside upper left", ncols=in_a_row, handlelength=2.2)
    places = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, panel in zip(places, panels, strict=False):
        _draw_panel(axes, panel, x_label, log_y)
    for axes in places[len(panels) :]:
        axes.remove()
    return figure


def _draw_panel(axes: Axes, panel: Panel, x_label: str, log_y: bool) -> None:
    """Smoothed curves in front of faint raw values. A line is interrupted at a gap; a value between gaps is a dot."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    # Titles, and a note if there is nothing to draw.
    axes.set_title(shortened(panel.key, 60) + (" (log scale)" if log_y else ""))
    axes.set_xlabel(x_label)
    drawn = [curve for curve in panel.curves if np.isfinite(curve.raw).any()]
    if not drawn:
        text = "no positive values" if log_y else "no finite values"
        axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=FAINT)
        axes.set(xticks=[], yticks=[])
        return
    # Raw values of all runs first, so that they are behind all smoothed curves.
    for curve in drawn:
        if not np.array_equal(curve.raw, curve.smooth, equal_nan=True):
            axes.plot(curve.x, curve.raw, color=_look(curve.run)[0], alpha=0.28, linewidth=0.8, zorder=2)
    for curve in drawn:
        colour, dashes = _look(curve.run)
        (line,) = axes.plot(curve.x, curve.smooth, color=colour, linestyle=dashes, linewidth=1.8, zorder=3)
        if alone := _alone(curve.smooth):
            line.set(marker="o", markersize=4, markevery=alone)
    # Ticks.
    axes.margins(x=0.01)
    counts = x_label != "hours"
    if counts:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10], integer=counts, min_n_ticks=1))
    finite = np.concatenate([curve.raw[np.isfinite(curve.raw)] for curve in drawn])
    _y_ticks(axes, finite, log_y)


def _y_ticks(axes: Axes, values: NDArray[np.float64], log_y: bool) -> None:
    """Ticks at round values with short labels. A log axis of many decades has ticks at powers of ten only; one of less
    than a decade has the ticks of a linear axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    if not log_y:
        if np.abs(values).max() >= 1e-3:
            return
    else:
        axes.set_yscale("log")
        decades = math.log10(values.max()) - math.log10(values.min())
        if decades < 2.5:
            axes.yaxis.set_major_locator(
                MaxNLocator(6, steps=[1, 2, 5, 10]) if decades < 1 else LogLocator(subs=(1.0, 2.0, 5.0))
            )
            axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))


def _short(value: float) -> str:
    """Six digits, with an exponent without leading zeros: 2e-5."""
    mantissa, mark, exponent = f"{value:.6g}".partition("e")
    return mantissa + mark + (str(int(exponent)) if mark else "")


def _look(run: int) -> tuple[str, Dashes]:
    """Colour and dashes of a run."""
    return COLOURS[run % len(COLOURS)], DASHES[run // len(COLOURS) % len(DASHES)]


def _alone(values: NDArray[np.float64]) -> list[int]:
    """Indices of finite values without a finite neighbour."""
    finite = np.concatenate([[False], np.isfinite(values), [False]])
    return np.flatnonzero(finite[1:-1] & ~finite[:-2] & ~finite[2:]).tolist()


def read_metrics(path: Path) -> Metrics:
    """All lines of a metrics.jsonl. SourceError names a damaged line, unless it is the last: a killed run may leave
    that incomplete."""
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
    """Mean of each value and its neighbours on both sides, with weights weight**distance, distance in points.

    values: (N,), NaN = gap. A gap stays a gap, and nothing is averaged across it. weight in [0, 1), 0 = no smoothing.
    Before the first gap, the mean extends no further to the right than to the left, so that the steep start of a curve
    is not lowered.
    """
    # The stretches between gaps, and the distance beyond which weights are negligible.
    out = values.copy()
    finite = np.isfinite(values)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], finite, [False]]).astype(np.int8)))
    reach = int(math.log(NEGLIGIBLE) / math.log(weight)) if weight else 0
    for first, end in zip(edges[::2], edges[1::2], strict=True):
        part, count = values[first:end], int(end - first)
        total, share = part.copy(), np.ones_like(part)
        # Add the neighbours at distance k: those on the left, then those on the right.
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
    """The metrics.jsonl of a run directory, or the file itself."""
    if source.is_dir():
        if not (source / METRICS).is_file():
            raise SourceError(f"{source / METRICS}: no such file, so {source} is not a run or has logged nothing yet")
        return source / METRICS
    if not source.is_file():
        raise SourceError(f"{source}: no such run or {METRICS}")
    return source


def _record(line: bytes) -> dict[str, Any] | None:
    """The JSON object in a line; None if it is damaged or has no step."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return record if isinstance(step, int) and not isinstance(step, bool) and 0 <= step < 1 << 62 else None


def _finite(value: float | None) -> float:
    """The value, or NaN if it cannot be drawn. Differences and ratios of the results are within a double's range."""
    if value is None or not abs(value) < 1e150:
        return math.nan
    return value if abs(value) > 1e-150 else 0.0


def _keys(runs: Sequence[Metrics], chosen: Sequence[str]) -> list[str]:
    """The keys to draw; RequestError for a key that no run has."""
    known = list(dict.fromkeys(name for run in runs for name in run.names()))
    for key in chosen:
        if key not in known:
            raise RequestError(f"--keys: no run has {key!r} (there are: {', '.join(known) or 'none'})")
    keys = list(dict.fromkeys(chosen)) or [key for key in DEFAULT_KEYS if key in known]
    if not keys:
        raise RequestError(f"--keys: choose what to draw (there are: {', '.join(known) or 'none'})")
    return keys


def _lacking(run: Metrics, chosen: Sequence[str]) -> list[str]:
    return [key for key in dict.fromkeys(chosen) if key not in run.names()]


def _positions(run: Metrics, axis: XAxis) -> NDArray[np.float64]:
    """The x position of every line: steps, images seen, or hours of training, computed from images_per_second."""
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
    # A line without a rate takes that of the next line that has one.
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
    """The curve of one key of one run. Lines without the key are not gaps. On a log axis values up to 0 are gaps, and
    logarithms are averaged. Few values are not smoothed."""
    at = [i for i, line in enumerate(run.values) if key in line]
    values = np.array([run.values[i][key] for i in at])
    weight = 0.0 if key in EXACT or len(values) < FEW else job.smooth
    if job.log_y:
        values[~(values > 0)] = math.nan
        return Curve(index, x[at], values, np.exp(smoothed(np.log(values), weight)) if weight else values)
    return Curve(index, x[at], values, smoothed(values, weight))


def _run_names(sources: Sequence[Path]) -> list[str]:
    """A name for each run: that of its folder, or of its file if that is not metrics.jsonl; the path as given if two
    names would be the same."""
    names = []
    for source in sources:
        path = source.resolve()
        names.append(path.name if path.is_dir() else path.parent.name if path.name == METRICS else path.stem)
    return [name if names.count(name) == 1 else str(source) for name, source in zip(names, sources, strict=True)]
