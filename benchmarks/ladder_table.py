"""The ladder's table: final distances, and how much less an arm needs than another; from the file of points alone."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import ladder_points
from ladder_arms import ARMS, Task, configured, training_flops
from ladder_points import read_points

from ldit.config.run import RunConfig
from ldit.figure import COLOURS, figure_bytes, new_figure, style

VARIANT = "bf16-compiled"
"""How the ladder trains, among the variants that `rate` measures."""
AGAINST = ("published", "ema")
"""Arms whose final distance is the target: the recipe as published, whose average still holds most of the initial
weights in so short a run, and the same with a warm-up of the average."""


def needed(curve: list[tuple[float, float]], target: float) -> tuple[float, bool] | None:
    """Images at which a falling curve of (images, distance) first reaches `target`, by log-linear interpolation between
    its points; None where it does not. The flag says that it was reached before the first point, so that the number is
    only an upper bound."""
    before: tuple[float, float] | None = None
    for x, y in curve:
        if y <= target:
            if before is None:
                return x, True
            share = (before[1] - target) / (before[1] - y)
            return float(before[0] * (x / before[0]) ** share), False
        before = (x, y)
    return None


def curves(task: Task, name: str, measure: str) -> dict[int, list[tuple[float, float]]]:
    """Seed -> (images, measure) of the complete runs of an arm."""
    found: dict[int, list[tuple[float, float]]] = {}
    for row in read_points(task).values():
        if row["arm"] == name and row["phase"] == "full":
            found.setdefault(row["seed"], []).append((row["images"], row[measure]))
    return {seed: sorted(points) for seed, points in sorted(found.items()) if len(points) == len(task.points)}


COLUMNS = (("fd_lite0", 1), ("fd_classifier", 2), ("neighbours", 2), ("heldout", 4))


def table_of(arms: list[str], task: Task) -> str:
    """The ladder, in Markdown: final distances, and how much less an arm needs for the final distance of another."""
    points = list(read_points(task).values())
    lines = [
        "Final distances after the whole budget; mean ± standard deviation over seeds.",
        "",
        "| arm | rate | seeds | FD Lite0 | FD classifier | neighbours | held-out |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in arms:
        last = [row for row in points if (row["arm"], row["phase"], row["step"]) == (name, "full", task.steps)]
        for prefix, words in (("", name), ("guided_", f"{name}, guided")):
            if last and f"{prefix}fd_lite0" in last[0]:
                cells = [spread_of([row.get(f"{prefix}{key}") for row in last], digits) for key, digits in COLUMNS]
                lines.append("| " + " | ".join([words, f"{last[0]['rate']:g}", str(len(last)), *cells]) + " |")
    for against in AGAINST:
        lines += savings(arms, against, task)
    lines += ["", "Rates tried at a third of the budget (FD Lite0 there):", ""]
    for name in arms:
        rows = sorted((row for row in points if (row["arm"], row["phase"]) == (name, "tune")), key=lambda r: r["rate"])
        if rows and any((row["arm"], row["phase"]) == (name, "full") for row in points):
            ends = {rows[0]["rate"], rows[-1]["rate"]}
            best = min(rows, key=lambda row: row["fd_lite0"])["rate"]
            tried = ", ".join(f"{row['rate']:g}: {row['fd_lite0']:.1f}" for row in rows)
            lines.append(f"- {name}: {tried}{' (the best is at an end of the grid)' if best in ends else ''}")
    return "\n".join(lines) + "\n"


def savings(arms: list[str], against: str, task: Task) -> list[str]:
    """A table of ratios: images, FLOPs and seconds that the arm `against` took for its final distance over those that
    another arm takes to it, by seed. "≥": reached before the first point that was measured."""
    reference = curves(task, against, "fd_lite0")
    if not reference:
        return []
    file = rates_file(task)
    speeds = json.loads(file.read_text())["images_per_second"] if file else {}
    lines = ["", f"How many times less than `{against}` took for its final FD Lite0 "
             "(≥: reached before the first point that was measured; -: not reached, or no speed was measured):", "",
             "| arm | images | FLOPs | seconds |", "|---|---|---|---|"]  # fmt: skip
    for name in arms:
        own, is_bound = curves(task, name, "fd_lite0"), False
        ratios: list[list[float]] = []
        for seed in sorted(own.keys() & reference.keys()):
            images, target = reference[seed][-1]
            found = needed(own[seed], target)
            if found is None:
                ratios.append([math.nan] * 3)
                continue
            is_bound |= found[1]
            ours, theirs = cost(name, task, found[0], speeds), cost(against, task, images, speeds)
            ratios.append([b / a if a and b else math.nan for a, b in zip(ours, theirs, strict=True)])
        if ratios:
            cells = [spread_of(list(column), 1, "x") for column in zip(*ratios, strict=True)]
            lines.append(f"| {name} | " + " | ".join("≥ " * (is_bound and cell != "-") + cell for cell in cells) + " |")
    return lines


def cost(name: str, task: Task, images: float, speeds: dict[str, Any]) -> tuple[float, float, float]:
    """Images, FLOPs and seconds of an arm up to a number of images; 0 seconds where its speed was not measured."""
    config = configured(ARMS[name], task, "x", ARMS[name].rates[0], 0, task.steps)
    own = speeds.get(name, {}).get(VARIANT)
    return images, training_flops(config, images), training_seconds(config, own, images) if own else 0.0


@style()
def draw(arms: list[str], task: Task, path: Path) -> None:
    """Both distances over images, a line an arm: the mean over seeds, and a band from the least to the largest."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    figure = new_figure(10.4, 4.6)
    for place, (measure, caption) in enumerate((("fd_lite0", "FD Lite0"), ("fd_classifier", "FD classifier"))):
        axes = figure.add_subplot(1, 2, place + 1)
        for number, name in enumerate(name for name in arms if curves(task, name, measure)):
            seeds = curves(task, name, measure).values()
            images = [x for x, _ in next(iter(seeds))]
            values = [[y for _, y in curve] for curve in seeds]
            columns = list(zip(*values, strict=True))
            colour, line = COLOURS[number % len(COLOURS)], "-" if number < len(COLOURS) else "--"
            axes.fill_between(images, list(map(min, columns)), list(map(max, columns)), color=colour, alpha=0.15, lw=0)
            axes.plot(images, list(map(mean, columns)), line, color=colour, label=f"{name} ({len(values)})")
        axes.set_xscale("log")
        axes.set_yscale("log")
        # Plain numbers at the points, and at 1, 2 and 5 of each decade.
        marked = [*images[:-2], images[-1]]
        axes.set_xticks(marked, [f"{x / 1000:g}k" for x in marked])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_title(caption)
        axes.set_xlabel("training images")
        if not place:
            axes.legend(title="arm (seeds)")
    path.write_bytes(figure_bytes(figure, path.suffix[1:]))


def spread_of(values: Sequence[float | None], digits: int, unit: str = "") -> str:
    """Mean and standard deviation over seeds; "-" where a seed has none."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known or len(known) < len(values):
        return "-"
    deviation = f" ± {stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{mean(known):.{digits}f}{deviation}{unit}"


def rates_file(task: Task) -> Path | None:
    return max(ladder_points.RESULTS.glob(f"*_ladder-rates-{task.name}.json"), default=None)


def training_seconds(config: RunConfig, speeds: list[float], images: float) -> float:
    """Seconds of training on the first images of a run, by the speeds of its stages and of the full size."""
    total, left = 0.0, images
    for stage, speed in zip(config.stages, speeds, strict=False):
        count = min(left, stage.steps * config.train.batch_size)
        total, left = total + count / speed, left - count
    return total + left / speeds[-1]
