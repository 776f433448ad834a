"""Several sources measured against one reference: one table, and what differs between them."""

import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

from ldit.checkpoint.run import configuration_of
from ldit.eval.report import better, conditions, number, spread
from ldit.pipeline.sets.stream import path_of
from ldit.readable import table

MOST_DIFFERENCES = 40
_LONGEST = 40  # characters of a value
_ABSENT = "-"


def compared(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One report of all sources, in their order. `differences`: key -> a text for each source, of conditions, sampling
    and configuration, where these are not the same for all."""
    names = list(dict.fromkeys(name for report in reports for name in report["figures"]))
    facts = [dict(_facts(report)) for report in reports]
    keys = dict.fromkeys(key for one in facts for key in one)
    columns = {key: [one.get(key, _ABSENT) for one in facts] for key in keys}
    return {
        "compared": [[report["compared"][0] for report in reports], reports[0]["compared"][1]],
        "figures": names,
        "reports": list(reports),
        "differences": {key: column for key, column in columns.items() if len(set(column)) > 1},
    }


def table_of(report: dict[str, Any]) -> str:
    """The report of `compared` as text: a row for each source, the conditions that all share, then a row for each
    setting in which they differ."""
    sources, reference = _short(report["compared"][0]), report["compared"][1]
    rows = [["source", *(f"{name} {better(name)}" for name in report["figures"])]]
    for source, one in zip(sources, report["reports"], strict=True):
        rows.append([source, *(_value(one, name) for name in report["figures"])])
    own = [conditions(one) for one in report["reports"]]
    shared = {name: value for name, value in own[0].items() if value != "-" and all(c[name] == value for c in own)}
    text = f"against {reference}\n{table(rows)}\n" + ", ".join(f"{name} {value}" for name, value in shared.items())
    differences = list(report["differences"].items())
    if not differences:
        return text
    heads = [["what differs", *sources]]
    text += "\n\n" + table([*heads, *([key, *values] for key, values in differences[:MOST_DIFFERENCES])])
    more = len(differences) - MOST_DIFFERENCES
    return text if more <= 0 else f"{text}\n… and {more} more (--json)"


def _short(sources: Sequence[str]) -> list[str]:
    """The sources without the folders that all their paths begin with."""
    shared = os.path.commonprefix([source.rstrip("/") for source in sources])  # noqa: RUF071  cut at its last slash
    return [source[shared.rfind("/") + 1 :] for source in sources]


def _value(report: dict[str, Any], name: str) -> str:
    """A metric with its deviation or interval in brackets; "-" where the source's report has none."""
    if name not in report:
        return _ABSENT
    around = spread(report, name)
    return f"{number(report[name])} ({around})" if around else number(report[name])


def _facts(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What a report and its source state, each as (key, text)."""
    yield from conditions(report).items()
    yield from _flat(report["samples"], "")
    yield from _flat(configuration_of(path_of(report["compared"][0])), "")


def _flat(value: Any, where: str) -> Iterator[tuple[str, str]]:
    """The leaves of nested objects by dotted names."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{where}.{key}" if where else str(key))
        return
    text = value if isinstance(value, str) else json.dumps(value)
    yield where, text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
