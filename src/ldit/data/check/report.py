"""`ldit data check`: a set of images or a latent cache -> what it holds, as text or JSON; lists of hashes."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ldit.config.requests.data import CheckRequest
from ldit.data.check import hashes
from ldit.data.check.scan import Difference, Reading, Report, Size, compare, scan_folder, scan_set
from ldit.data.images.decoding import Decoding
from ldit.data.source import data_root, kind_of, open_data, open_whole_cache
from ldit.errors import DataError, RequestError, SourceError
from ldit.storage.atomic import replaced
from ldit.storage.manifest import check_not_in_checkpoint

_SIZE = 64  # to which images of other sets than folders are cut, where no size is asked for
_FEW, _NAMES = 8, 4  # lines of a list, names in one line
_OTHERS = {  # kinds that are no folder of images
    "cache": "a latent cache",
    "idx": "a set of IDX files",
    "tars": "tar shards",
    "list": "a folder with metadata.jsonl",
}


@dataclass(frozen=True)
class Result:
    """What was found, and how it differs from a list of hashes where one was given."""

    job: CheckRequest
    report: Report
    difference: Difference | None = None

    @property
    def sound(self) -> bool:
        return self.report.sound and not self.difference


def check_data(job: CheckRequest) -> Result:
    """Look at every image of `job.path`; an image at which a thread hangs is bad, and the others go on.

    RequestError or DataError when there is nothing to look at, or nobody can say what. RunError when too many hang.
    """
    _check_job(job)
    root = data_root(job.path)
    other = _OTHERS.get(kind_of(root))
    for flag, file in (("--write", job.write), ("--against", job.against)):
        if file is not None and other is not None:
            raise RequestError(f"{flag}: lists of hashes are of folders of images, {root} is {other}")
    if job.write is not None:
        _check_target(job.write)
    listed = None if job.against is None else hashes.read(job.against)
    if other is not None:
        return Result(job, _check_other(job, root, other))
    with tqdm(unit="image", disable=None, leave=False) as bar:
        report = scan_folder(root, _decoding(job), job.image_size or 0, _reading(job, bar))
    if job.write is not None:
        with replaced(job.write) as temporary:
            temporary.write_bytes(hashes.encode(report.digests))
    return Result(job, report, None if listed is None else compare(root, report, listed, _reading(job)))


def _decoding(job: CheckRequest) -> Decoding:
    return Decoding(job.exif, job.background, job.max_pixels)


def _reading(job: CheckRequest, bar: tqdm | None = None) -> Reading:
    return Reading(job.workers, job.timeout, None if bar is None else bar.update)


def _check_job(job: CheckRequest) -> None:
    for flag, value in (("image-size", job.image_size), ("max-pixels", job.max_pixels), ("workers", job.workers)):
        if value is not None and value < 1:
            raise RequestError(f"--{flag}: must be at least 1, got {value}")
    if not job.timeout > 0:
        raise RequestError(f"--timeout: must be more than 0, got {job.timeout}")
    if not all(0 <= value <= 255 for value in job.background):
        raise RequestError(f"--background: three numbers from 0 to 255, got {' '.join(map(str, job.background))}")


def _check_target(target: Path) -> None:
    """RequestError where no list can be written: nothing but an older list is replaced."""
    check_not_in_checkpoint(target)
    if not target.parent.is_dir():
        raise RequestError(f"--write: no folder {target.parent}")
    if target.is_dir():
        raise RequestError(f"--write: {target} is a folder")
    if target.exists():
        try:
            hashes.read(target)
        except DataError:
            raise RequestError(f"--write: {target} is there and is no list of hashes; choose another name") from None


def _check_other(job: CheckRequest, root: Path, kind: str) -> Report:
    """The report of what is no folder of images. What a run would refuse at its start is a problem, the first one."""
    try:
        if kind == _OTHERS["cache"]:
            train, heldout = open_whole_cache(root)
            return Report(kind, len(train) + (0 if heldout is None else len(heldout)))
        found = open_data(str(root), job.image_size or _SIZE, decoding=_decoding(job))
    except (SourceError, DataError) as error:
        return Report(kind, problems=[str(error)])
    sets = [pictures for pictures in found if pictures is not None]
    with tqdm(unit="image", total=sum(map(len, sets)), disable=None, leave=False) as bar:
        return scan_set(kind, sets, _decoding(job), job.image_size or 0, _reading(job, bar))


def as_json(result: Result) -> dict[str, Any]:
    """All of it, for machines."""
    report, difference = result.report, result.difference
    whole: dict[str, Any] = {
        "path": result.job.path,
        "kind": report.kind,
        "total": report.total,
        "sound": result.sound,
        "bad": [{"file": name, "reason": reason} for name, reason in report.bad],
        "problems": report.problems,
        "classes": dict(report.classes),
        "beside_classes": report.beside,
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
    if difference is not None:
        whole |= asdict(difference)
    return whole


def as_text(result: Result) -> list[str]:
    """At most 40 lines, for people."""
    report = result.report
    lines = [_row("path", result.job.path), _row("kind", report.kind), _row("images", report.total)]
    lines += _list("bad", len(report.bad), (f"{name}: {reason}" for name, reason in report.bad))
    lines += _list("problems", len(report.problems), report.problems, _NAMES)
    if report.classes:
        counts = report.classes.values()
        lines.append(
            _row("classes", f"{len(counts)}, {min(counts)} to {max(counts)} images: {_counts(report.classes)}")
        )
    if report.beside or report.others:
        lines.append(_row("beside", f"no run reads {' and '.join(_beside(report))}"))
    if report.smallest is not None and report.largest is not None:
        lines += _images(result, report.smallest, report.largest)
    if report.digests:
        lines += _duplicates(report)
    if result.difference is not None:
        lines += [_row(what, _some(names)) for what, names in asdict(result.difference).items()]
    return [*lines, _row("verdict", "sound" if result.sound else "not sound")]


def _beside(report: Report) -> Iterator[str]:
    """What lies there and no run reads; a file's kind is told by its name alone."""
    if report.beside:
        yield f"{report.beside} images beside the class folders"
    if report.others:
        kinds = Counter({suffix or "no suffix": count for suffix, count in report.others.items()})
        yield f"{report.others.total()} files that are not named as images: {_counts(kinds)}"


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
    # Copies in two classes teach two labels for one image: those stand first.
    groups.sort(key=lambda group: not report.across_classes(group))
    lines = _list("", len(groups), (_some(group, counted=False) for group in groups), _NAMES)[1:]
    return [_row("duplicates", head if groups else "0"), *lines]


def _row(name: str, value: object) -> str:
    return f"{name:<12}{value}"


def _list(name: str, count: int, lines: Iterable[str], most: int = _FEW) -> list[str]:
    """A heading with the count and the first lines; a heading alone for none."""
    shown = [f"  {line}" for _, line in zip(range(most), lines, strict=False)]
    more = [f"  … and {count - most} more"] if count > most else []
    return [_row(name, count), *shown, *more]


def _some(names: list[str], counted: bool = True) -> str:
    shown = ", ".join(names[:_NAMES])
    more = f", … and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
    return (f"{len(names)} " if counted else "") + shown + more


def _counts(counter: Counter[str]) -> str:
    common = counter.most_common()
    shown = ", ".join(f"{name} {count}" for name, count in common[:_FEW])
    return shown + (f", … and {len(common) - _FEW} more" if len(common) > _FEW else "")
