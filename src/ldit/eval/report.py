"""The report of an evaluation: what its metrics depend on, warnings, and the table."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from ldit.eval.features import Extractor
from ldit.eval.metrics.scores import SPLIT
from ldit.eval.reference import Statistics, has_statistics
from ldit.pipeline.sets.stream import ImageStream, path_of
from ldit.readable import table as aligned
from ldit.storage.npz import LABELS, members

CLASSES_SHOWN = 32
COMPONENTS = 64
"""A number of principal components to advise, where there are images enough."""


def depends(extractor: Extractor, samples: ImageStream, reference: dict[str, Any]) -> dict[str, Any]:
    """What every metric of a report depends on, besides the numbers of images."""
    random = samples.about.get("label_rule") == "random"
    return {
        "labels": "random" if random else balance(samples.labels, samples.classes),
        "evaluations": samples.about.get("evaluations"),
        "extractor": extractor.name,
        "extractor_sha256": extractor.fingerprint,
        "resize": extractor.resize,
        "protocol": getattr(extractor, "protocol", None),
        "samples": samples.about,
        "reference": reference,
    }


def balance(labels: Sequence[int] | None, classes: int | None) -> str:
    """How balanced the labels of a set are, over all `classes` that it could have; with None, over those it has."""
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
    """A warning if there are too few images for a meaningful Fréchet distance, else ""."""
    least, whose = min((samples, "images"), (samples if reference is None else reference, "reference images"))
    if least > extractor.width:
        return ""
    return (
        f"{least} {whose} for {extractor.width} features: a Fréchet distance of so few is far too large; compare only "
        f"sets of equal size, or a few principal components (--components {min(COMPONENTS, least // 4) or 1}), or KID"
    )


def remarks(
    samples: ImageStream, reference: Statistics | ImageStream, compared: tuple[str, str], splits: bool
) -> list[str]:
    """Warnings about what the samples and the reference do not state, or do not have in common. `compared` are their
    names. `splits`: whether the Inception Score is computed in splits that follow the order of the images."""
    # The samples.
    name, reference_name = compared
    lines = []
    if name.endswith(".npz"):
        path = path_of(name)
        if has_statistics(path):
            lines.append(f"{name} holds statistics too: its images are measured")
        if samples.labels is None and LABELS in members(path):
            lines.append(f"{name}: {LABELS} is not one integer an image: labels are unknown")
    if splits and samples.labels is not None and samples.count > SPLIT and _sorted(samples.labels):
        lines.append(f"{name} is sorted by class: the Inception Score of its splits is not meaningful")
    # The reference.
    if isinstance(reference, Statistics) and not reference.resize:
        lines.append(
            f"{reference_name} does not state the weights and resize rule of its statistics: assumed to be those of "
            "this evaluation (--protocol)"
        )
    return [*lines, line] if (line := other_size(samples.size, reference.size)) else lines


def other_size(samples: tuple[int, int], reference: tuple[int, int] | None) -> str:
    """A warning where the reference's images have another (H, W) than the samples; "" where they have not, or do not
    state it."""
    if reference in (None, samples):
        return ""
    sizes = (f"{height} x {width}" for height, width in (samples, reference or ()))
    return (
        "images of {} are compared with a reference of {}: resizing affects metrics (--image-size, of folders and of "
        "ldit stats)"
    ).format(*sizes)


def _sorted(labels: Sequence[int]) -> bool:
    return labels[0] != labels[-1] and all(a <= b for a, b in pairwise(labels))


def table(report: dict[str, Any]) -> str:
    """The report as text: what is compared, a line for each metric with the better direction, what all depend on, and
    a line for each class if there are few."""
    rows = [["metric", "value", "", ""]]
    rows += [[name, number(report[name]), spread(report, name), better(name)] for name in report["figures"]]
    depends = ", ".join(f"{name} {value}" for name, value in conditions(report).items() if value != "-")
    text = f"{title(report)}\n{aligned(rows)}\n{depends}"
    classes = report.get("classes") or []
    if 1 < len(classes) <= CLASSES_SHOWN:
        keys = list(classes[0])
        heads = ["images" if key == "pictures" else key for key in keys]  # the key is that of files of all versions
        text += "\n\n" + aligned([heads, *([_cell(row[key]) for key in keys] for row in classes)])
    return text


def better(name: str) -> str:
    """An arrow to the better side of a metric."""
    return "↑" if name in ("inception_score", "precision", "recall", "caption_top1") else "↓"


def title(report: dict[str, Any]) -> str:
    """The samples and what they are compared with."""
    samples, reference = report["compared"]
    return f"{samples} against {reference}"


def conditions(report: dict[str, Any]) -> dict[str, str]:
    """What every metric of the report depends on, as texts by name."""
    evaluations, reference = report["evaluations"], report.get("reference") or {}
    # Images in a file of statistics, for the metrics of single images.
    kept = reference.get("pictures") if "statistics" in reference else None
    return {
        "images": f"{report['num_samples']:,}",
        "reference images of precision, recall and KID": "-" if kept is None else f"{kept:,}",
        "labels": str(report["labels"]),
        "extractor": f"{report['extractor']} {report['extractor_sha256'][:12]}",
        "protocol": report.get("protocol") or "-",
        "resize": report["resize"],
        "evaluations": "-" if evaluations is None else str(evaluations),
    }


def spread(report: dict[str, Any], name: str) -> str:
    """The deviation or the interval of a metric; "" if it has none."""
    if report.get(f"{name}_deviation"):  # 0 for a single subset or split
        return f"± {number(report[f'{name}_deviation'])}"
    if f"{name}_interval" in report:
        low, high = report[f"{name}_interval"]
        return f"{number(low)} to {number(high)}"
    return ""


def number(value: float) -> str:
    """The value with five significant digits."""
    return f"{value:.5g}"


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
