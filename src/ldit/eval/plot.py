"""Draws an evaluation: its metrics, both sets in two principal components, and a bar for each class."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldit.eval.metrics.components import Cloud
from ldit.eval.report import CLASSES_SHOWN, conditions, number, spread, title
from ldit.figure import COLOURS, FAINT, new_figure, shortened, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SAMPLES, REFERENCE = COLOURS[0], COLOURS[4]
SHARES = {"precision": COLOURS[2], "accuracy": COLOURS[3]}
DEVIATIONS = 2.0
_PANEL, _LINE, _EDGE = 5.4, 0.22, 0.15  # inches: width and height of a panel, height of a line of text, margin


@style()
def draw(report: dict[str, Any], samples: Cloud, reference: Cloud) -> Figure:
    """Metrics on top; below them both sets as point clouds, and beside those the classes if the report has shares of
    them."""
    # How large the figure must be.
    classes = report.get("classes") or []
    shares = [name for name in SHARES if classes and name in classes[0]] if 1 < len(classes) <= CLASSES_SHOWN else []
    columns = 2 if shares else 1
    lines = _text(report, columns)
    width, height = columns * _PANEL, _PANEL + len(lines) * _LINE + 2 * _EDGE
    figure = new_figure(width, height)
    # Text at the top, line by line; the panels share the rest.
    for row, pieces in enumerate(lines):
        y = 1 - (_EDGE + row * _LINE) / height
        for x, text, look in pieces:
            figure.text(x / width, y, text, va="top", **look)
    figure.get_layout_engine().set(rect=(0, 0, 1, _PANEL / height))  # type: ignore[union-attr, call-arg]
    axes = figure.subplots(1, columns, squeeze=False).flat
    _clouds(axes[0], samples, reference)
    if shares:
        _bars(axes[1], classes, shares)
    return figure


def _text(report: dict[str, Any], columns: int) -> list[list[tuple[float, str, dict[str, Any]]]]:
    """Lines of (inches from the left, text, style): what is compared, a line for each metric, and what they depend
    on."""
    titles = textwrap.wrap(shortened(title(report), 220), 54 * columns)
    lines: list[list[tuple[float, str, dict[str, Any]]]] = [[(_EDGE, line, {"size": 11})] for line in titles] + [[]]
    for name in report["figures"]:
        value = (2.6, number(report[name]), {"ha": "right", "weight": "bold"})
        lines.append([(_EDGE, name, {}), value, (2.8, spread(report, name), {})])
    words = ", ".join(f"{name} {value}" for name, value in conditions(report).items() if value != "-")
    small = [[(_EDGE, line, {"color": FAINT, "size": 8.5})] for line in textwrap.wrap(words, 72 * columns)]
    return [*lines, [], *small]


def _clouds(axes: Axes, samples: Cloud, reference: Cloud) -> None:
    """Points of both sets, and the Gaussians that the Fréchet distance compares, as ellipses at DEVIATIONS standard
    deviations. Both axes have the same scale, so that distances can be compared."""
    from matplotlib.patheffects import Normal, Stroke

    # Points in random order, so that neither set covers the other.
    sets = ((reference, REFERENCE, "reference"), (samples, SAMPLES, "samples"))
    points = torch.cat([cloud.points.double() for cloud, *_ in sets])
    colours = [colour for cloud, colour, _ in sets for _ in range(len(cloud.points))]
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(0)).tolist()
    size = 5 if len(points) > 2000 else 14
    axes.scatter(
        points[order, 0].numpy(), points[order, 1].numpy(), size, [colours[i] for i in order],
        linewidths=0, alpha=0.8, rasterized=True,
    )  # fmt: skip
    # Ellipses, with a white outline.
    for cloud, colour, name in sets:
        outline = _ellipse(cloud)
        halo = [Stroke(linewidth=4.5, foreground="white"), Normal()]
        axes.plot(outline[:, 0], outline[:, 1], color=colour, linewidth=2.2, label=name, path_effects=halo)
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_xlabel(f"first principal component of the reference; ellipses: {DEVIATIONS:g} deviations")
    axes.set_ylabel("second principal component")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)


def _ellipse(cloud: Cloud, pieces: int = 120) -> Tensor:
    """Points (pieces + 1, 2) of the ellipse at DEVIATIONS standard deviations from the mean."""
    values, vectors = torch.linalg.eigh(cloud.covariance)
    turns = torch.arange(pieces + 1, dtype=torch.float64) * (2 * math.pi / pieces)
    circle = torch.stack([turns.cos(), turns.sin()])
    return (cloud.mean[:, None] + DEVIATIONS * vectors @ (values.clamp(min=0).sqrt()[:, None] * circle)).T


def _bars(axes: Axes, classes: list[dict[str, Any]], shares: list[str]) -> None:
    """Bars of shares from 0 to 1, with the first class on top."""
    thick = 0.8 / len(shares)
    for index, name in enumerate(shares):
        places = [row + (index - (len(shares) - 1) / 2) * thick for row in range(len(classes))]
        axes.barh(places, [row[name] for row in classes], 0.9 * thick, color=SHARES[name], label=name)
    labels = [shortened(f"{row['class']} ({row['pictures']})", 28) for row in classes]
    axes.set_yticks(range(len(classes)), labels, size=9.5 if len(classes) <= 20 else 7.5)
    axes.set(xlim=(0, 1), ylim=(len(classes) - 0.5, -0.5), xlabel="share of the images of a class")
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
