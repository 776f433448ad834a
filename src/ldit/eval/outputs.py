"""Writes the files of an evaluation; checks before the work that they can be written and replace nothing else."""

import json
import os
from pathlib import Path
from typing import Any

from PIL import Image

from ldit.checkpoint.run import trained_on
from ldit.data.source import BUNDLED
from ldit.errors import EvaluationError, RequestError
from ldit.eval.metrics.collect import Collected
from ldit.eval.metrics.metrics import Reference, clouds
from ldit.eval.plot import draw
from ldit.eval.reference import ABOUT
from ldit.eval.report import title
from ldit.figure import figure_bytes
from ldit.pipeline.sets.stream import is_images, path_of
from ldit.storage.atomic import json_text
from ldit.storage.npz import members
from ldit.storage.outputs import check_target, put, refuse_inside

_LARGEST = 1 << 26  # bytes of a report
_TEXT = "ldit evaluate"  # key in the metadata of a figure
_HEAD = 1 << 14  # bytes at the start of an SVG, which hold its metadata


def check_outputs(report: Path | None, figure: Path | None, compared: tuple[str, str]) -> None:
    """RequestError for files that cannot be written, that are part of what is compared, that are the same file, or that
    exist and are not an older report or figure."""
    inputs = {source: path_of(source) for source in compared if str(path_of(source)) not in BUNDLED}
    targets = [file for file in (report, figure) if file is not None]
    for file in targets:
        check_target(file, inputs.values())
    if report is not None and figure is not None and _real(report) == _real(figure):
        raise RequestError(f"{report}: the report and the figure need a file each")
    # Only files of earlier evaluations may be replaced.
    for file in targets:
        if file.exists() and not (_is_figure if file is figure else _is_report)(file):
            raise RequestError(f"{file} exists and was not made by ldit evaluate; choose another name")
    # A figure in a folder of images would become one of them.
    for source, path in inputs.items():
        folder = path if is_images(source) else trained_on(path)
        for file in targets:
            refuse_inside(file, [] if folder is None else [folder])


def check_statistics_file(out: Path, source: str) -> None:
    """The same for `ldit stats`: only its own files may be replaced."""
    check_target(out, [path_of(source)])
    refuse_inside(out, [path_of(source)])
    if out.exists() and not _is_statistics(out):
        raise RequestError(f"{out} exists and was not made by ldit stats; choose another name")


def write_outputs(
    target: Path | None, figure: Path | None, report: dict[str, Any], collected: Collected, reference: Reference
) -> None:
    """Write both files. RunError if one cannot be written; the other is written all the same."""
    try:
        if target is not None:
            put(target, json_text(report))
    finally:
        if figure is not None:
            chart = draw(report, *clouds(collected, reference))
            put(figure, figure_bytes(chart, figure.suffix[1:].lower(), {_TEXT: title(report)}))


def _is_report(path: Path) -> bool:
    """Whether a file is a report, or empty."""
    try:
        size = path.stat().st_size
        report = json.loads(path.read_text(encoding="utf-8")) if 0 < size <= _LARGEST else None
    except (OSError, ValueError, RecursionError):
        return False
    return not size or (isinstance(report, dict) and {"compared", "figures"} <= report.keys())


def _is_figure(path: Path) -> bool:
    """Whether a file is a figure of an evaluation, or empty."""
    try:
        if not path.stat().st_size:
            return True
        if path.suffix.lower() == ".svg":
            with path.open("rb") as file:
                return f"{_TEXT}: ".encode() in file.read(_HEAD)
        with Image.open(path, formats=("PNG",)) as image:
            return _TEXT in image.info  # from the header, where ours is
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False


def _real(path: Path) -> Path:
    """The path with links resolved."""
    return Path(os.path.realpath(path))


def _is_statistics(path: Path) -> bool:
    try:
        return not path.stat().st_size or ABOUT in members(path)
    except (EvaluationError, OSError):
        return False
