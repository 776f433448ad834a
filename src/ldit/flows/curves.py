"""Panels of curves as a picture, with Pillow alone: axes, 1-2-5 ticks, grid, legend."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw, ImageFont

# Okabe and Ito's palette, told apart by colour-blind readers; its yellow is too pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
TEXT, GRID, FRAME = "#333333", "#E8E8E8", "#9A9A9A"
SUPERSAMPLE = 4
FONT = ImageFont.load_default(size=13)
KEY_FONT = ImageFont.load_default(size=15)

# Pixels of one panel: the plot area, and what stands around it.
WIDE, LONE = (520, 230), (860, 420)
LEFT, RIGHT, TOP, BOTTOM = 66, 22, 34, 46
MARGIN, LEGEND_ROW, SWATCH = 12, 22, 28

Point = tuple[float, float]


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


@dataclass(frozen=True)
class Axis:
    """low..high over `length` pixels, linear or logarithmic."""

    low: float
    high: float
    length: int
    log: bool = False

    def at(self, value: float) -> float:
        """Pixels from the low end."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low) * (self.length - 1)
        return (value - self.low) / (self.high - self.low) * (self.length - 1)

    def ticks(self, count: int) -> list[float]:
        """About `count` round values within the axis."""
        return log_ticks(self.low, self.high, count) if self.log else linear_ticks(self.low, self.high, count)


def draw(panels: Sequence[Panel], runs: Sequence[str], x_label: str, log_y: bool) -> Image.Image:
    """One picture: the legend of all `runs`, then a panel a key, two in a row. `panels` is not empty."""
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


def linear_ticks(low: float, high: float, count: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten within [low, high], at most `count` + 1."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float, count: int) -> list[float]:
    """1, 2 and 5 times powers of ten within [low, high]; over many decades powers of ten alone, over less than one
    decade round values as on a linear axis."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for mantissas, every in (((1, 2, 5), 1), *(((1,), n) for n in range(1, last - first + 1))):
        values = [m * 10.0**e for e in range(first, last + 1) if e % every == 0 for m in mantissas]
        inside = [v for v in values if low * (1 - 1e-9) <= v <= high * (1 + 1e-9)]
        if len(inside) <= count + 2:
            return inside if len(inside) >= 3 else [v for v in linear_ticks(low, high, count) if v > 0]
    raise AssertionError("some stride leaves few enough powers of ten")


def tick_labels(ticks: Sequence[float], log: bool) -> list[str]:
    """Short exact texts for ticks. On a linear axis all have the unit and the decimals of one."""
    if log:
        return [_label(tick, _unit(abs(tick))) for tick in ticks]
    largest = max(map(abs, ticks), default=0.0)
    texts = [_label(tick, _unit(largest), largest < 1e-2) for tick in ticks]
    if any("e" in text for text in texts):
        return texts
    decimals = max((len(re.sub(r"^[^.]*\.?|[kMGT]", "", text)) for text in texts), default=0)
    scale, suffix = _unit(largest)
    return [f"{tick / scale:.{decimals}f}{suffix if tick else ''}" for tick in ticks]


def _unit(size: float) -> tuple[float, str]:
    units = ((1e12, 1e12, "T"), (1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k"))
    return next(((scale, suffix) for least, scale, suffix in units if least <= size < 1e15), (1.0, ""))


def _label(value: float, unit: tuple[float, str], scientific: bool = False) -> str:
    size = abs(value)
    if size and (scientific or size < 1e-3 or size >= 1e15):
        mantissa, _, exponent = f"{value:.5e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value / unit[0]:.6g}{unit[1] if value else ''}"


def _range(values: NDArray[np.float64], length: int, log: bool, pad: float) -> Axis | None:
    """The axis of the finite `values` with `pad` of its length at both ends; None when there are none."""
    values = values[np.isfinite(values)]
    if not values.size:
        return None
    low, high = float(values.min()), float(values.max())
    if log:
        spread = max((high / low) ** pad, 1.02)
        return Axis(low / spread, high * spread, length, True)
    margin = (high - low) * pad if high - low > 1e-9 * max(abs(low), abs(high)) else abs(high) * 0.1 or 1.0
    return Axis(0.0 if 0 <= low < high / 4 else low - margin, high + margin, length)


def _draw_panel(
    canvas: Image.Image, corner: tuple[int, int], area: tuple[int, int], panel: Panel, x_label: str, log_y: bool
) -> None:
    left, top = corner[0] + LEFT, corner[1] + TOP
    pen = ImageDraw.Draw(canvas)
    pen.text((left, top - 9), panel.key + (" (log scale)" if log_y else ""), TEXT, KEY_FONT, anchor="ls")
    pen.text((left + area[0] // 2, top + area[1] + 26), x_label, TEXT, FONT, anchor="ma")
    drawn = [curve for curve in panel.curves if np.isfinite(curve.raw).any()]
    x = _range(np.concatenate([curve.x for curve in drawn]), area[0], False, 0.0) if drawn else None
    y = _range(np.concatenate([c.raw for c in drawn]), area[1], log_y, 0.04) if drawn else None
    if x is None or y is None:
        pen.rectangle((left - 1, top - 1, left + area[0], top + area[1]), outline=FRAME)
        text = "no positive values" if log_y else "no finite values"
        pen.text((left + area[0] // 2, top + area[1] // 2), text, FRAME, FONT, anchor="mm")
        return
    x_ticks, y_ticks = x.ticks(7), y.ticks(6)
    columns = [round(x.at(tick)) for tick in x_ticks]
    rows = [area[1] - 1 - round(y.at(tick)) for tick in y_ticks]
    canvas.paste(_plot_area(area, columns, rows, drawn, x, y), (left, top))
    pen.rectangle((left - 1, top - 1, left + area[0], top + area[1]), outline=FRAME)
    for column, text in zip(columns, tick_labels(x_ticks, x.log), strict=True):
        pen.line((left + column, top + area[1], left + column, top + area[1] + 4), FRAME)
        pen.text((left + column, top + area[1] + 7), text, TEXT, FONT, anchor="ma")
    for row, text in zip(rows, tick_labels(y_ticks, y.log), strict=True):
        pen.line((left - 5, top + row, left - 2, top + row), FRAME)
        pen.text((left - 9, top + row), text, TEXT, FONT, anchor="rm")


def _plot_area(
    area: tuple[int, int], columns: Sequence[int], rows: Sequence[int], curves: Sequence[Curve], x: Axis, y: Axis
) -> Image.Image:
    """Grid and lines, drawn large and reduced so that they are smooth. All raw values lie behind all means."""
    s = SUPERSAMPLE
    image = Image.new("RGB", (area[0] * s, area[1] * s), "white")
    pen = ImageDraw.Draw(image)
    for column in columns:
        pen.rectangle((column * s, 0, column * s + s - 1, area[1] * s), GRID)
    for row in rows:
        pen.rectangle((0, row * s, area[0] * s, row * s + s - 1), GRID)
    for behind in (True, False):
        for curve in curves:
            if behind and np.array_equal(curve.raw, curve.smooth, equal_nan=True):
                continue
            colour = COLOURS[curve.run % len(COLOURS)]
            for part in _parts(curve.x, curve.raw if behind else curve.smooth, x, y):
                dashed = curve.run >= len(COLOURS) and not behind
                _line(pen, part, _faint(colour) if behind else colour, s if behind else 2 * s, dashed)
    return image.reduce(s)


def _parts(xs: NDArray[np.float64], values: NDArray[np.float64], x: Axis, y: Axis) -> Iterator[list[Point]]:
    """The curve between its gaps, in pixels of the large picture."""
    part: list[Point] = []
    for here, value in zip(xs.tolist(), values.tolist(), strict=True):
        if math.isfinite(value):
            part.append(((x.at(here) + 0.5) * SUPERSAMPLE, (y.length - 0.5 - y.at(value)) * SUPERSAMPLE))
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
        text = name
        while len(text) > 8 and FONT.getlength(text) > width - SWATCH - 8:
            middle = len(text) // 2
            text = f"{text[: middle - 2]}…{text[middle + 2 :]}"
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
