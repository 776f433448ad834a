"""What charts with Pillow alone have in common: palette, fonts, axes with 1-2-5 ticks, frames."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

# Okabe and Ito's palette, told apart by colour-blind readers; its yellow is too pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
TEXT, GRID, FRAME = "#333333", "#E8E8E8", "#9A9A9A"
SUPERSAMPLE = 4
FONT = ImageFont.load_default(size=13)
KEY_FONT = ImageFont.load_default(size=15)

Point = tuple[float, float]


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


def axis_of(values: NDArray[np.float64], length: int, log: bool, pad: float) -> Axis | None:
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


def plot(
    canvas: Image.Image, corner: tuple[int, int], x: Axis, y: Axis, marks: Callable[[ImageDraw.ImageDraw], None]
) -> None:
    """A framed plot area with grid and ticks, its upper left pixel at `corner`. `marks` draws into it in pixels that
    are SUPERSAMPLE times as fine (see `fine`); reduced, its lines are smooth."""
    (left, top), s = corner, SUPERSAMPLE
    x_ticks, y_ticks = x.ticks(7), y.ticks(6)
    columns = [round(x.at(tick)) for tick in x_ticks]
    rows = [y.length - 1 - round(y.at(tick)) for tick in y_ticks]
    area = Image.new("RGB", (x.length * s, y.length * s), "white")
    inside = ImageDraw.Draw(area)
    for column in columns:
        inside.rectangle((column * s, 0, column * s + s - 1, y.length * s), GRID)
    for row in rows:
        inside.rectangle((0, row * s, x.length * s, row * s + s - 1), GRID)
    marks(inside)
    canvas.paste(area.reduce(s), corner)
    pen = ImageDraw.Draw(canvas)
    frame(pen, corner, (x.length, y.length))
    for column, text in zip(columns, tick_labels(x_ticks, x.log), strict=True):
        pen.line((left + column, top + y.length, left + column, top + y.length + 4), FRAME)
        pen.text((left + column, top + y.length + 7), text, TEXT, FONT, anchor="ma")
    for row, text in zip(rows, tick_labels(y_ticks, y.log), strict=True):
        pen.line((left - 5, top + row, left - 2, top + row), FRAME)
        pen.text((left - 9, top + row), text, TEXT, FONT, anchor="rm")


def fine(x: Axis, y: Axis, point: Point) -> Point:
    """Where a point lies in the fine pixels of `plot`."""
    return (x.at(point[0]) + 0.5) * SUPERSAMPLE, (y.length - 0.5 - y.at(point[1])) * SUPERSAMPLE


def frame(pen: ImageDraw.ImageDraw, corner: tuple[int, int], area: tuple[int, int]) -> None:
    """A line around a plot area."""
    left, top = corner
    pen.rectangle((left - 1, top - 1, left + area[0], top + area[1]), outline=FRAME)


def shortened(text: str, width: float, font: ImageFont.FreeTypeFont | ImageFont.ImageFont = FONT) -> str:
    """The text without its middle where it is wider than `width` pixels."""
    while len(text) > 8 and font.getlength(text) > width:
        middle = len(text) // 2
        text = f"{text[: middle - 2]}…{text[middle + 2 :]}"
    return text
