"""A report of `ldit evaluate` as an image: the figures with what they depend on, both sets in two principal components
of the reference, and a bar a class."""

import math
from typing import Any

import torch
from PIL import Image, ImageDraw

from ldit.commands.chart import (
    COLOURS,
    FONT,
    FRAME,
    GRID,
    KEY_FONT,
    SUPERSAMPLE,
    TEXT,
    Axis,
    Point,
    fine,
    plot,
    shortened,
)
from ldit.eval.metrics.components import Cloud
from ldit.eval.report import CLASSES_SHOWN, conditions, number, spread, title

SIDE = 460  # pixels of the plot area
WIDE = 2 * SIDE + 130
MARGIN, ROW, LEFT, NAMES = 18, 20, 66, 150
SAMPLES, REFERENCE = COLOURS[0], COLOURS[4]
SHARES = ("precision", "accuracy")
DEVIATIONS = 2.0


def draw(report: dict[str, Any], samples: Cloud, reference: Cloud) -> Image.Image:
    """Figures above; below them the clouds, and beside those shares of classes where the report has them."""
    classes = report.get("classes") or []
    shares = [name for name in SHARES if classes and name in classes[0]] if 1 < len(classes) <= CLASSES_SHOWN else []
    top = 2 * MARGIN + (len(report["figures"]) + 4) * ROW
    canvas = Image.new("RGB", (WIDE if shares else SIDE + LEFT + 3 * MARGIN, top + SIDE + 66), "white")
    pen = ImageDraw.Draw(canvas)
    _figures(pen, report, canvas.width - 2 * MARGIN)
    _clouds(canvas, (LEFT, top), samples, reference)
    if shares:
        _bars(pen, (LEFT + SIDE + NAMES + 36, top), classes, shares)
    return canvas


def _figures(pen: ImageDraw.ImageDraw, report: dict[str, Any], width: int) -> None:
    """A row a figure, and one line of what they all depend on."""
    pen.text((MARGIN, MARGIN), shortened(title(report), width, KEY_FONT), TEXT, KEY_FONT)
    for row, name in enumerate(report["figures"], 2):
        y = MARGIN + row * ROW
        pen.text((MARGIN, y), name, TEXT, FONT)
        pen.text((MARGIN + 250, y), number(report[name]), TEXT, FONT, anchor="ra")
        pen.text((MARGIN + 268, y), spread(report, name), TEXT, FONT)
    words = [f"{name} {value}" for name, value in conditions(report).items() if value != "-"]
    y = MARGIN + (len(report["figures"]) + 2) * ROW + 4
    for line in _wrapped(words, width):
        pen.text((MARGIN, y), line, FRAME, FONT)
        y += ROW - 4


def _wrapped(words: list[str], width: int) -> list[str]:
    """The words joined by commas, in as few lines as they need."""
    lines = [words[0]]
    for word in words[1:]:
        longer = f"{lines[-1]}, {word}"
        if FONT.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _clouds(canvas: Image.Image, corner: tuple[int, int], samples: Cloud, reference: Cloud) -> None:
    """Points of both sets in one order of chance, so that neither hides the other, and the Gaussians that the Fréchet
    distance compares, as ellipses of two deviations."""
    sets = ((reference, REFERENCE), (samples, SAMPLES))
    outlines = [_ellipse(cloud) for cloud, _ in sets]
    points = [
        (point, colour, SUPERSAMPLE * (1.5 if len(cloud.points) > 1000 else 2.5))
        for cloud, colour in sets
        for point in cloud.points.tolist()
    ]
    every = torch.tensor([point for point, *_ in points] + [p for outline in outlines for p in outline]).double()
    middle, half = (every.amax(0) + every.amin(0)) / 2, 0.52 * float((every.amax(0) - every.amin(0)).max())
    x, y = (Axis(at - half, at + half, SIDE) for at in middle.tolist())  # one scale: distances are those of the plane
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(0)).tolist()

    def marks(pen: ImageDraw.ImageDraw) -> None:
        for place in order:
            point, colour, radius = points[place]
            px, py = fine(x, y, point)
            pen.ellipse((px - radius, py - radius, px + radius, py + radius), colour)
        for outline in outlines:
            pen.line([fine(x, y, point) for point in outline], "white", 5 * SUPERSAMPLE, joint="curve")
        for outline, (_, colour) in zip(outlines, sets, strict=True):
            pen.line([fine(x, y, point) for point in outline], colour, 3 * SUPERSAMPLE, joint="curve")

    plot(canvas, corner, x, y, marks)
    pen, (left, top) = ImageDraw.Draw(canvas), corner
    words = "principal components 1 and 2 of the reference; ellipses: 2 deviations"
    pen.text((left, top + SIDE + 26), words, TEXT, FONT)
    for word, colour, shift in (("reference", REFERENCE, 0), ("samples", SAMPLES, 110)):
        at = left + shift
        pen.ellipse((at, top - 15, at + 8, top - 7), colour)
        pen.text((at + 14, top - 11), word, TEXT, FONT, anchor="lm")


def _ellipse(cloud: Cloud, pieces: int = 120) -> list[Point]:
    """Points two deviations from the mean, all around."""
    values, vectors = torch.linalg.eigh(cloud.covariance)
    turns = torch.arange(pieces + 1, dtype=torch.float64) * (2 * math.pi / pieces)
    model_group = torch.stack([turns.cos(), turns.sin()])
    outline = cloud.mean[:, None] + DEVIATIONS * vectors @ (values.clamp(min=0).sqrt()[:, None] * model_group)
    return [(float(a), float(b)) for a, b in outline.T]


def _bars(pen: ImageDraw.ImageDraw, corner: tuple[int, int], classes: list[dict[str, Any]], shares: list[str]) -> None:
    """Shares from 0 to 1, the bars of a class one below the other."""
    (left, top), high = corner, SIDE / len(classes)
    axis = Axis(0.0, 1.0, WIDE - left - 3 * MARGIN)
    thick = min(0.8 * high / len(shares), 14.0)
    for tick in axis.ticks(5):
        x = left + axis.at(tick)
        pen.line((x, top, x, top + SIDE), GRID)
        pen.text((x, top + SIDE + 7), f"{tick:.1f}", TEXT, FONT, anchor="ma")
    for place, row in enumerate(classes):
        middle = top + (place + 0.5) * high
        words = shortened(f"{row['class']} ({row['pictures']})", NAMES)
        pen.text((left - 8, middle), words, TEXT, FONT, anchor="rm")
        for index, name in enumerate(shares):
            y = middle + (index - len(shares) / 2) * thick
            pen.rectangle((left, y, left + axis.at(row[name]), y + thick - 2), COLOURS[index + 2])
    pen.line((left, top, left, top + SIDE), FRAME)
    for index, name in enumerate(shares):
        at = left + index * 110
        pen.rectangle((at, top - 15, at + 8, top - 7), COLOURS[index + 2])
        pen.text((at + 14, top - 11), name, TEXT, FONT, anchor="lm")
