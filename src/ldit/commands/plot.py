"""`ldit plot`: curves of runs from their metrics.jsonl, a panel a key; imports no torch."""

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
from ldit.figure import COLOURS, FAINT, check_plotting, new_figure, shortened, style, write_figure
from ldit.log import logger
from ldit.storage.atomic import replaced
from ldit.storage.names import METRICS
from ldit.storage.outputs import check_target, written
from ldit.track import numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Dashes = Literal["-"] | tuple[float, tuple[float, ...]]  # solid, or (offset, (on, off, …))

DEFAULT_KEYS = ("loss", "eps_mse", "grad_norm", "lr", "images_per_second")
EXACT = ("lr",)  # has no noise: a mean would only round its corners
FEW = 20  # values of one key, such as held-out losses, are drawn as they are
NEGLIGIBLE = 1e-3  # weight below which a neighbour does not count
DASHES: tuple[Dashes, ...] = ("-", (0.0, (4.0, 1.5)), (0.0, (1.0, 1.2)))  # of the first seven runs, the next seven, …


@dataclass(frozen=True)
class Metrics:
    """One metrics.jsonl: `steps[i]` and `values[i]` are of one line; null and non-finite values are NaN."""

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
    # Read the runs, and decide which keys have a panel and where on the x axis each line lies.
    runs, names = [read_metrics(_metrics_file(source)) for source in job.runs], _run_names(job.runs)
    keys = _keys(runs, job.keys)
    axes = [_positions(run, job.x) for run in runs]
    if missing := [f"{name}: {key}" for name, run in zip(names, runs, strict=True) for key in _lacking(run, job.keys)]:
        logger.warning("not logged, so not drawn: %s", ", ".join(missing))
    panels = [
        Panel(key, tuple(_curve(i, axes[i], run, key, job) for i, run in enumerate(runs) if key in run.names()))
        for key in keys
    ]
    # Draw, and replace the file whole.
    figure = draw(panels, names, job.x, job.log_y)
    with written(job.out), replaced(job.out) as temporary:
        write_figure(figure, temporary, job.out.suffix[1:].lower())
    return job.out


@style()
def draw(panels: Sequence[Panel], runs: Sequence[str], x_label: str, log_y: bool) -> Figure:
    """The legend of all `runs` above, then a panel a key, two in a row. `panels` is not empty."""
    from matplotlib.lines import Line2D

    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    width, height = (10.8, 3.0 * rows) if columns > 1 else (8.4, 4.6)
    # The longest name decides how many entries of the legend a row holds; the figure grows by its rows.
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
    """Raw values faint behind all means. A line is broken at a gap, and a value between two gaps is a dot."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.set_title(shortened(panel.key, 60) + (" (log scale)" if log_y else ""))
    axes.set_xlabel(x_label)
    drawn = [curve for curve in panel.curves if np.isfinite(curve.raw).any()]
    if not drawn:
        text = "no positive values" if log_y else "no finite values"
        axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=FAINT)
        axes.set(xticks=[], yticks=[])
        return
    for curve in drawn:
        if not np.array_equal(curve.raw, curve.smooth, equal_nan=True):
            axes.plot(curve.x, curve.raw, color=_look(curve.run)[0], alpha=0.28, linewidth=0.8, zorder=2)
    for curve in drawn:
        colour, dashes = _look(curve.run)
        (line,) = axes.plot(curve.x, curve.smooth, color=colour, linestyle=dashes, linewidth=1.8, zorder=3)
        if alone := _alone(curve.smooth):
            line.set(marker="o", markersize=4, markevery=alone)
    axes.margins(x=0.01)
    counts = x_label != "hours"
    if counts:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10], integer=counts, min_n_ticks=1))
    finite = np.concatenate([curve.raw[np.isfinite(curve.raw)] for curve in drawn])
    _y_ticks(axes, finite, log_y)


def _y_ticks(axes: Axes, values: NDArray[np.float64], log_y: bool) -> None:
    """Round values with short labels. A log axis of many decades has powers of ten alone, one of less than a decade
    ticks as on a linear axis."""
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
    """Six digits, and an exponent without zeros in front: 2e-5."""
    mantissa, mark, exponent = f"{value:.6g}".partition("e")
    return mantissa + mark + (str(int(exponent)) if mark else "")


def _look(run: int) -> tuple[str, Dashes]:
    """Colour and dashes of a run."""
    return COLOURS[run % len(COLOURS)], DASHES[run // len(COLOURS) % len(DASHES)]


def _alone(values: NDArray[np.float64]) -> list[int]:
    """Places of finite values without a finite neighbour, (N,) -> list."""
    finite = np.concatenate([[False], np.isfinite(values), [False]])
    return np.flatnonzero(finite[1:-1] & ~finite[:-2] & ~finite[2:]).tolist()


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


def _keys(runs: Sequence[Metrics], chosen: Sequence[str]) -> list[str]:
    """The panels; RequestError with the names there are."""
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
