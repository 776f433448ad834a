"""The report of an evaluation: what every metric depends on, and all as a table."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from ldit.eval.features import Extractor
from ldit.eval.metrics.scores import SPLIT
from ldit.eval.reference import Statistics, has_statistics
from ldit.pipeline.sets.stream import ImageStream, path_of
from ldit.storage.npz import LABELS, members

CLASSES_SHOWN = 32


def depends(extractor: Extractor, samples: ImageStream, reference: dict[str, Any]) -> dict[str, Any]:
    """What every metric of a report depends on, beside the numbers of images."""
    random = samples.about.get("label_rule") == "random"
    return {
        "labels": "random" if random else balance(samples.labels, samples.classes),
        "evaluations": samples.about.get("evaluations"),
        "extractor": extractor.name,
        "extractor_sha256": extractor.fingerprint,
        "resize": extractor.resize,
        "samples": samples.about,
        "reference": reference,
    }


def balance(labels: Sequence[int] | None, classes: int | None) -> str:
    """How even the labels of a set are, over all `classes` that it could have; None: over those it has."""
    if labels is None:
        return "unknown"
    counts = Counter(labels)
    seen, most = len(counts), max(counts.values())
    even = most - min(counts.values()) <= 1
    if even and seen == classes:
        return "balanced"
    if even:
        return f"balanced, {seen} classes" if classes is None else f"balanced, {seen} of {classes} classes"
    return f"{0 if classes is not None and seen < classes else min(counts.values())} to {most} a class"


def too_few(extractor: Extractor, samples: int, reference: int | None) -> str:
    """Why a Fréchet distance of so many images says little, "" where it does not."""
    least, whose = min((samples, "images"), (samples if reference is None else reference, "reference images"))
    if least > extractor.width:
        return ""
    return (
        f"{least} {whose} for {extractor.width} features: a Fréchet distance of so few is far too large; compare sets "
        "of equal size alone, or a few principal components (--components 64), or KID"
    )


def remarks(
    samples: ImageStream, reference: Statistics | ImageStream, compared: tuple[str, str], splits: bool
) -> list[str]:
    """Lines to warn of what both sides do not say, or do not have in common. `compared` are their names; `splits` is
    whether the Inception Score is computed, whose splits are taken in the order of the images."""
    name, reference_name = compared
    lines = []
    if name.endswith(".npz"):
        path = path_of(name)
        if has_statistics(path):
            lines.append(f"{name} holds statistics too: its images are measured")
        if samples.labels is None and LABELS in members(path):
            lines.append(f"{name}: {LABELS} is not one integer an image: labels are unknown")
    if splits and samples.labels is not None and samples.count > SPLIT and _sorted(samples.labels):
        lines.append(f"{name} is in the order of its classes: the Inception Score of its splits says little")
    if isinstance(reference, Statistics):
        if not reference.resize:
            lines.append(
                f"{reference_name} does not say which weights and resize rule its statistics are of: taken for ours"
            )
    elif reference.size != samples.size:
        sizes = (f"{height} x {width}" for height, width in (samples.size, reference.size))
        lines.append("images of {} are compared with a reference of {}: resizing counts, too".format(*sizes))
    return lines


def _sorted(labels: Sequence[int]) -> bool:
    return labels[0] != labels[-1] and all(a <= b for a, b in pairwise(labels))


def table(report: dict[str, Any]) -> str:
    """Lines of text: what is compared, a metric each, then a class each where there are few."""
    depends = conditions(report)
    rows = [["metric", "value", "", *depends]]
    rows += [[name, number(report[name]), spread(report, name), *depends.values()] for name in report["figures"]]
    text = f"{title(report)}\n" + _aligned(rows)
    classes = report.get("classes") or []
    if 1 < len(classes) <= CLASSES_SHOWN:
        keys = list(classes[0])
        text += "\n\n" + _aligned([keys, *([_cell(row[key]) for key in keys] for row in classes)])
    return text


def title(report: dict[str, Any]) -> str:
    """What is compared with what."""
    samples, reference = report["compared"]
    return f"{samples} against {reference}"


def conditions(report: dict[str, Any]) -> dict[str, str]:
    """What every metric of the report depends on, by name."""
    evaluations = report["evaluations"]
    return {
        "images": f"{report['num_samples']:,}",
        "labels": str(report["labels"]),
        "extractor": f"{report['extractor']} {report['extractor_sha256'][:12]}",
        "resize": report["resize"],
        "evaluations": "-" if evaluations is None else str(evaluations),
    }


def spread(report: dict[str, Any], name: str) -> str:
    """The deviation or the interval of a metric, "" where it has none."""
    if report.get(f"{name}_deviation"):  # none of a single subset or split
        return f"± {number(report[f'{name}_deviation'])}"
    if f"{name}_interval" in report:
        low, high = report[f"{name}_interval"]
        return f"{number(low)} to {number(high)}"
    return ""


def number(value: float) -> str:
    """Five digits."""
    return f"{value:.5g}"


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    kept = [i for i, width in enumerate(widths) if width]
    return "\n".join("  ".join(row[i].ljust(widths[i]) for i in kept).rstrip() for row in rows)
