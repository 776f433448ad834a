"""A report of `ldit evaluate` as a table: every figure beside what it depends on."""

from typing import Any

CLASSES_SHOWN = 32


def table(report: dict[str, Any]) -> str:
    """Lines of text: a figure each, then a class each where there are few."""
    conditions = [
        f"{report['num_samples']:,}",
        str(report["labels"]),
        f"{report['extractor']} {report['extractor_sha256'][:12]}",
        report["resize"],
        "-" if report["evaluations"] is None else str(report["evaluations"]),
    ]
    rows = [["figure", "value", "", "pictures", "labels", "extractor", "resize", "evaluations"]]
    rows += [[name, _number(report[name]), _spread(report, name), *conditions] for name in report["figures"]]
    text = _aligned(rows)
    classes = report.get("classes") or []
    if 1 < len(classes) <= CLASSES_SHOWN:
        keys = list(classes[0])
        text += "\n\n" + _aligned([keys, *([_cell(row[key]) for key in keys] for row in classes)])
    return text


def _spread(report: dict[str, Any], name: str) -> str:
    if f"{name}_deviation" in report:
        return f"± {_number(report[f'{name}_deviation'])}"
    if f"{name}_interval" in report:
        low, high = report[f"{name}_interval"]
        return f"{_number(low)} – {_number(high)}"
    return ""


def _number(value: float) -> str:
    return f"{value:.5g}"


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    kept = [i for i, width in enumerate(widths) if width]
    return "\n".join("  ".join(row[i].ljust(widths[i]) for i in kept).rstrip() for row in rows)
