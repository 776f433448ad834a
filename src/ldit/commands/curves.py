"""Panels of curves as an image, with a legend."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw

from ldit.commands.chart import (
    COLOURS,
    FONT,
    FRAME,
    KEY_FONT,
    SUPERSAMPLE,
    TEXT,
    Axis,
    Point,
    axis_of,
    fine,
    frame,
    plot,
    shortened,
)

# Pixels of one panel: the plot area, and what stands around it.
WIDE, LONE = (520, 230), (860, 420)
LEFT, RIGHT, TOP, BOTTOM = 66, 22, 34, 46
MARGIN, LEGEND_ROW, SWATCH = 12, 22, 28


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


def draw(panels: Sequence[Panel], runs: Sequence[str], x_label: str, log_y: bool) -> Image.Image:
    """One image: the legend of all `runs`, then a panel a key, two in a row. `panels` is not empty."""
    columns = 1 if len(panels) == 1 else 2
    area = LONE if len(panels) == 1 else WIDE
    width, height = area[0] + LEFT + RIGHT, area[1] + TOP + BOTTOM
    total = columns * width + 2 * MARGIN
    places, legend = _legend_places(runs, total - 2 * MARGIN)
    rows = -(-len(panels) // columns)
    canvas = Image.new("RGB", (total, legend + rows * height + 2 * MARGIN), "white")
    pen = ImageDraw.Draw(canvas)
    for index, (x, y, name) in enumerate(places):
        _swatch(canvas, (x + MARGIN, y + MARGIN), index)
        pen.text((x + MARGIN + SWATCH + 8, y + MARGIN + LEGEND_ROW // 2), name, TEXT, FONT, anchor="lm")
    for index, panel in enumerate(panels):
        corner = (MARGIN + index % columns * width, MARGIN + legend + index // columns * height)
        _draw_panel(canvas, corner, area, panel, x_label, log_y)
    return canvas


def _draw_panel(
    canvas: Image.Image, corner: tuple[int, int], area: tuple[int, int], panel: Panel, x_label: str, log_y: bool
) -> None:
    left, top = corner[0] + LEFT, corner[1] + TOP
    pen = ImageDraw.Draw(canvas)
    pen.text((left, top - 9), panel.key + (" (log scale)" if log_y else ""), TEXT, KEY_FONT, anchor="ls")
    pen.text((left + area[0] // 2, top + area[1] + 26), x_label, TEXT, FONT, anchor="ma")
    drawn = [curve for curve in panel.curves if np.isfinite(curve.raw).any()]
    x = axis_of(np.concatenate([curve.x for curve in drawn]), area[0], False, 0.0) if drawn else None
    y = axis_of(np.concatenate([c.raw for c in drawn]), area[1], log_y, 0.04) if drawn else None
    if x is None or y is None:
        frame(pen, (left, top), area)
        text = "no positive values" if log_y else "no finite values"
        pen.text((left + area[0] // 2, top + area[1] // 2), text, FRAME, FONT, anchor="mm")
        return
    plot(canvas, (left, top), x, y, lambda inside: _lines(inside, drawn, x, y))


def _lines(pen: ImageDraw.ImageDraw, curves: Sequence[Curve], x: Axis, y: Axis) -> None:
    """All raw values lie behind all means."""
    for behind in (True, False):
        for curve in curves:
            if behind and np.array_equal(curve.raw, curve.smooth, equal_nan=True):
                continue
            colour = COLOURS[curve.run % len(COLOURS)]
            for part in _parts(curve.x, curve.raw if behind else curve.smooth, x, y):
                dashed = curve.run >= len(COLOURS) and not behind
                width = SUPERSAMPLE if behind else 2 * SUPERSAMPLE
                _line(pen, part, _faint(colour) if behind else colour, width, dashed)


def _parts(xs: NDArray[np.float64], values: NDArray[np.float64], x: Axis, y: Axis) -> Iterator[list[Point]]:
    """The curve between its gaps, in pixels of the large image."""
    part: list[Point] = []
    for here, value in zip(xs.tolist(), values.tolist(), strict=True):
        if math.isfinite(value):
            part.append(fine(x, y, (here, value)))
        elif part:
            yield part
            part = []
    if part:
        yield part


def _line(pen: ImageDraw.ImageDraw, points: list[Point], colour: str, width: int, dashed: bool) -> None:
    """A line with round joints and ends, so that a single point is a dot."""
    for piece in _dashes(points, 7.0 * SUPERSAMPLE) if dashed else (points,):
        if len(piece) > 1:
            pen.line(piece, colour, width, joint="curve")
        radius = width / 2 if len(points) > 1 else width
        for px, py in (piece[0], piece[-1]):
            pen.ellipse((px - radius, py - radius, px + radius, py + radius), colour)


def _dashes(points: Sequence[Point], length: float) -> Iterator[list[Point]]:
    """Every other piece of `length` along the line."""
    piece, left, on = [points[0]], length, True
    for (ax, ay), (bx, by) in pairwise(points):
        distance, done = math.hypot(bx - ax, by - ay), 0.0
        while distance - done > left:
            done += left
            piece.append((ax + (bx - ax) * done / distance, ay + (by - ay) * done / distance))
            if on:
                yield piece
            piece, left, on = [piece[-1]], length, not on
        left -= distance - done
        piece.append((bx, by))
    if on:
        yield piece


def _faint(colour: str) -> str:
    """Two thirds of the way to white."""
    return "#" + "".join(f"{255 - (255 - c) * 32 // 100:02x}" for c in ImageColor.getrgb(colour)[:3])


def _legend_places(names: Sequence[str], width: int) -> tuple[list[tuple[int, int, str]], int]:
    """(x, y, text) of each entry, row by row, and the height of all."""
    places, x, y = [], 0, 0
    for name in names:
        text = shortened(name, width - SWATCH - 8)
        needed = SWATCH + 8 + int(FONT.getlength(text)) + 24
        if x and x + needed - 24 > width:
            x, y = 0, y + LEGEND_ROW
        places.append((x, y, text))
        x += needed
    return places, y + LEGEND_ROW + 4


def _swatch(canvas: Image.Image, corner: tuple[int, int], run: int) -> None:
    s = SUPERSAMPLE
    image = Image.new("RGB", (SWATCH * s, LEGEND_ROW * s), "white")
    ends = [(2.0 * s, LEGEND_ROW * s / 2), ((SWATCH - 2.0) * s, LEGEND_ROW * s / 2)]
    _line(ImageDraw.Draw(image), ends, COLOURS[run % len(COLOURS)], 3 * s, run >= len(COLOURS))
    canvas.paste(image.reduce(s), corner)
