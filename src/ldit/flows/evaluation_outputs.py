"""The files of an evaluation: what they may replace, which is looked at before the work, and how they are written."""

import json
from pathlib import Path
from typing import Any

from ldit.checkpoint.commit import replaced, write_json_atomic
from ldit.errors import EvaluationError, RequestError
from ldit.eval.collect import Collected
from ldit.eval.figures import Reference, clouds
from ldit.eval.npz import members
from ldit.eval.statistics import ABOUT
from ldit.flows.evaluation_figure import draw
from ldit.flows.output_file import check_target, written
from ldit.flows.picture_stream import is_pictures, path_of

_LARGEST = 1 << 26  # bytes of a report


def check_outputs(report: Path | None, figure: Path | None, compared: tuple[str, str]) -> None:
    """RequestError for files that cannot be written, or that would replace what is compared, the records of a set or a
    run, anything but an older report, or each other."""
    inputs = [path_of(source) for source in compared]
    for file in filter(None, (report, figure)):
        check_target(file, inputs)
    if report is not None:
        if figure is not None and report.absolute() == figure.absolute():
            raise RequestError(f"{report}: the report and the figure need a file each")
        if report.exists() and not _is_report(report):
            raise RequestError(f"{report} exists and is no report of ldit evaluate: choose another name")
    for source, folder in zip(compared, inputs, strict=True):
        if figure is not None and is_pictures(source) and folder.resolve() in figure.resolve().parents:
            raise RequestError(f"{figure}: would become one of the pictures of {source}")


def check_statistics_file(out: Path, source: str) -> None:
    """The same for `ldit stats`, whose own files may be replaced."""
    check_target(out, [path_of(source)])
    if out.exists() and not _is_statistics(out):
        raise RequestError(f"{out} exists and is no file of ldit stats: choose another name")


def write_outputs(
    target: Path | None, figure: Path | None, report: dict[str, Any], found: Collected, reference: Reference
) -> None:
    """RequestError where one was not written."""
    if target is not None:
        with written(target):
            write_json_atomic(target, report)
    if figure is not None:
        picture = draw(report, *clouds(found, reference))
        with written(figure), replaced(figure) as temporary:
            picture.save(temporary, "PNG")


def _is_report(path: Path) -> bool:
    """An empty file may become one."""
    try:
        size = path.stat().st_size
        found = json.loads(path.read_text(encoding="utf-8")) if 0 < size <= _LARGEST else None
    except (OSError, ValueError, RecursionError):
        return False
    return not size or (isinstance(found, dict) and {"compared", "figures"} <= found.keys())


def _is_statistics(path: Path) -> bool:
    try:
        return not path.stat().st_size or ABOUT in members(path)
    except (EvaluationError, OSError):
        return False
