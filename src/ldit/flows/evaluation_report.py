"""A report of `ldit evaluate` as a table: every figure beside what it depends on."""

from typing import Any

CLASSES_SHOWN = 32


def table(report: dict[str, Any]) -> str:
    """Lines of text: a figure each, then a class each where there are few."""
    depends = conditions(report)
    rows = [["figure", "value", "", *depends]]
    rows += [[name, number(report[name]), spread(report, name), *depends.values()] for name in report["figures"]]
    text = _aligned(rows)
    classes = report.get("classes") or []
    if 1 < len(classes) <= CLASSES_SHOWN:
        keys = list(classes[0])
        text += "\n\n" + _aligned([keys, *([_cell(row[key]) for key in keys] for row in classes)])
    return text


def conditions(report: dict[str, Any]) -> dict[str, str]:
    """What every figure of the report depends on, by name."""
    evaluations = report["evaluations"]
    return {
        "pictures": f"{report['num_samples']:,}",
        "labels": str(report["labels"]),
        "extractor": f"{report['extractor']} {report['extractor_sha256'][:12]}",
        "resize": report["resize"],
        "evaluations": "-" if evaluations is None else str(evaluations),
    }


def spread(report: dict[str, Any], name: str) -> str:
    """The deviation or the interval of a figure, "" where it has none."""
    if f"{name}_deviation" in report:
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
