"""`ldit data check`: reports what a set of images or a latent cache contains and what is wrong with it."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ldit.config.requests.data import CheckRequest
from ldit.data.formats.heldout import default_list, share_of
from ldit.data.formats.table import Format, format_of
from ldit.data.images.decoding import Decoding
from ldit.data.scan import Reading, Report, Size, scan_folder, scan_set
from ldit.data.source import data_root, open_data, open_whole_cache
from ldit.errors import DataError, RequestError, SourceError, some

_SIZE = 64  # default size to which images are cropped, of sets that are not folders
_FEW, _NAMES = 8, 4  # lines of a list, names in one line


@dataclass(frozen=True)
class Result:
    """A request and its report."""

    job: CheckRequest
    report: Report

    @property
    def sound(self) -> bool:
        return self.report.sound


def run_check(request: CheckRequest) -> int:
    """`ldit data check`; exit code 1 when anything is bad."""
    result = check_data(request)
    if request.json:
        print(json.dumps(as_json(result)))
    else:
        for line in as_text(result):
            print(_printable(line))
    return 0 if result.sound else 1


def check_data(job: CheckRequest) -> Result:
    """Check every image of `job.path`. An image whose reading hangs is bad; the check continues with the others.

    RequestError or DataError when there are no images, or the path is ambiguous. RunError when too many images hang.
    """
    _check_job(job)
    root = data_root(job.path)
    form = format_of(root)
    if form.kind not in ("folders", "loose"):
        return Result(job, _check_other(job, root, form))
    with tqdm(unit="image", disable=None, leave=False) as bar:
        heldout = default_list(root) if job.heldout is None else job.heldout
        heldout = "" if share_of(heldout) is not None and not (root / heldout).exists() else heldout
        return Result(job, scan_folder(root, _decoding(job), job.image_size or 0, _reading(job, bar), heldout))


def _decoding(job: CheckRequest) -> Decoding:
    return Decoding(job.exif, job.background, job.max_pixels)


def _reading(job: CheckRequest, bar: tqdm) -> Reading:
    return Reading(job.workers, job.timeout, bar.update)


def _check_job(job: CheckRequest) -> None:
    for flag, value in (("image-size", job.image_size), ("max-pixels", job.max_pixels), ("workers", job.workers)):
        if value is not None and value < 1:
            raise RequestError(f"--{flag}: must be at least 1, got {value}")
    if not job.timeout > 0:
        raise RequestError(f"--timeout: must be more than 0, got {job.timeout}")
    if not all(0 <= value <= 255 for value in job.background):
        raise RequestError(f"--background: three numbers from 0 to 255, got {' '.join(map(str, job.background))}")


def _check_other(job: CheckRequest, root: Path, form: Format) -> Report:
    """The report of a set that is not a folder of images. Errors that would stop a run at its start are listed as
    problems."""
    kind = form.title
    try:
        if form.kind == "cache":
            train, heldout = open_whole_cache(root)
            return Report(kind, len(train) + (0 if heldout is None else len(heldout)))
        opened = open_data(str(root), job.image_size or _SIZE, job.heldout, decoding=_decoding(job))
    except (SourceError, DataError) as error:
        return Report(kind, problems=[str(error)])
    sets = [images for images in opened if images is not None]
    with tqdm(unit="image", total=sum(map(len, sets)), disable=None, leave=False) as bar:
        report = scan_set(kind, sets, _decoding(job), job.image_size or 0, _reading(job, bar))
        report.heldout = len(sets[1]) if len(sets) > 1 else None
        return report


def as_json(result: Result) -> dict[str, Any]:
    """The complete report, for programs."""
    report = result.report
    return {
        # The verdict, with everything that is bad.
        "path": result.job.path,
        "kind": report.kind,
        "total": report.total,
        "sound": result.sound,
        "bad": [{"file": name, "reason": reason} for name, reason in report.bad],
        "problems": report.problems,
        # What there is.
        "classes": dict(report.classes),
        "heldout": report.heldout,
        "heldout_unmatched": report.unmatched,
        "other_files": dict(report.others),
        "formats": dict(report.formats),
        "modes": dict(report.modes),
        "short_sides": {str(side): report.short_sides[side] for side in sorted(report.short_sides)},
        "smallest": None if report.smallest is None else report.smallest._asdict(),
        "largest": None if report.largest is None else report.largest._asdict(),
        "enlarged": report.enlarged if result.job.image_size else None,
        "exif_oriented": report.oriented,
        "animated": report.animated,
        "duplicates": [
            {"files": group, "across_classes": report.across_classes(group)} for group in report.duplicates()
        ],
    }


def as_text(result: Result) -> list[str]:
    """The report in at most 40 lines."""
    report = result.report
    lines = [_row("path", result.job.path), _row("kind", report.kind), _row("images", report.total)]
    lines += _list("bad", len(report.bad), (f"{name}: {reason}" for name, reason in report.bad))
    lines += _list("problems", len(report.problems), report.problems, _NAMES)
    if report.classes:
        counts = report.classes.values()
        lines.append(
            _row("classes", f"{len(counts)}, {min(counts)} to {max(counts)} images: {_counts(report.classes)}")
        )
    if report.heldout is not None:
        lines.append(_row("held out", _heldout(report)))
    if report.others:
        kinds = Counter({suffix or "no suffix": count for suffix, count in report.others.items()})
        files = f"{report.others.total()} files that are not named as images"
        lines.append(_row("beside", f"no run reads {files}: {_counts(kinds)}"))
    if report.smallest is not None and report.largest is not None:
        lines += _images(result, report.smallest, report.largest)
    if report.digests:
        lines += _duplicates(report)
    return [*lines, _row("verdict", "sound" if result.sound else "not sound")]


def _heldout(report: Report) -> str:
    missed = report.unmatched
    return f"{report.heldout} images" + (f"; {len(missed)} entries match no image: {some(missed, 3)}" if missed else "")


def _images(result: Result, smallest: Size, largest: Size) -> list[str]:
    report, size = result.report, result.job.image_size
    sides = (f"{side}-{2 * side - 1}: {report.short_sides[side]}" for side in sorted(report.short_sides))
    lines = [
        _row("formats", _counts(report.formats)),
        _row("modes", _counts(report.modes)),
        _row("short side", ", ".join(sides)),
        *(_row(what, f"{s.width} x {s.height} {s.name}") for what, s in (("smallest", smallest), ("largest", largest))),
    ]
    if size:
        lines.append(_row("enlarged", f"{report.enlarged} with a short side below {size}"))
    applied = "applied" if result.job.exif else "not applied without --exif"
    lines.append(_row("EXIF", f"{report.oriented} with an orientation" + (f", {applied}" if report.oriented else "")))
    lines.append(_row("animations", f"{report.animated}" + (", the first frame counts" if report.animated else "")))
    return lines


def _duplicates(report: Report) -> list[str]:
    groups = report.duplicates()
    across = sum(map(report.across_classes, groups))
    head = f"{sum(map(len, groups)) - len(groups)} in {len(groups)} groups of equal files"
    head += f", {across} of them across classes" if across else ""
    # Duplicates in different classes come first: they give one image two labels.
    groups.sort(key=lambda group: not report.across_classes(group))
    lines = _list("", len(groups), (some(group, _NAMES) for group in groups), _NAMES)[1:]
    return [_row("duplicates", head if groups else "0"), *lines]


def _row(name: str, value: object) -> str:
    return f"{name:<12}{value}"


def _list(name: str, count: int, lines: Iterable[str], most: int = _FEW) -> list[str]:
    """A heading with the count, then the first `most` lines."""
    shown = [f"  {line}" for _, line in zip(range(most), lines, strict=False)]
    more = [f"  … and {count - most} more"] if count > most else []
    return [_row(name, count), *shown, *more]


def _counts(counter: Counter[str]) -> str:
    common = counter.most_common()
    shown = ", ".join(f"{name} {count}" for name, count in common[:_FEW])
    return shown + (f", … and {len(common) - _FEW} more" if len(common) > _FEW else "")


def _printable(line: str) -> str:
    """The line with control characters and invalid UTF-8, which file names may contain, shown as escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
