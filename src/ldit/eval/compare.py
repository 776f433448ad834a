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
_USED = ("format", "sampling", "process", "codec", "conditioner", "training", "cascade")


def compared(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One report of all sources, in their order. `differences`: key -> a text for each source, of conditions, sampling
    and configuration, where these are not the same for all."""
    names = list(dict.fromkeys(name for report in reports for name in report["figures"]))
    measured = [dict(_measured(report)) for report in reports]
    trained = [dict(_trained(report)) for report in reports]
    return {
        "compared": [[report["compared"][0] for report in reports], reports[0]["compared"][1]],
        "figures": names,
        "reports": list(reports),
        "differences": {**_differing(measured), **_differing(trained)},
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
    shown = [[key, *map(_cut, values)] for key, values in differences[:MOST_DIFFERENCES]]
    text += "\n\n" + table([*heads, *shown])
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


def _differing(sources: Sequence[dict[str, str]]) -> dict[str, list[str]]:
    """Keys whose values are not the same for all sources that state any, with a text for each source."""
    keys = dict.fromkeys(key for one in sources for key in one)
    columns = {key: [one.get(key, _ABSENT) for one in sources if one] for key in keys}
    return {key: [one.get(key, _ABSENT) for one in sources] for key, column in columns.items() if len(set(column)) > 1}


def _measured(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The conditions of a report and how its images were sampled, each as (key, text)."""
    yield from conditions(report).items()
    yield from _flat(report["samples"], "")


def _trained(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The configuration of a run, else the description of a model, but for what `_measured` has as it was used."""
    path = path_of(report["compared"][0])
    for section, values in configuration_of(path).items() if path.exists() else ():
        if section not in _USED:
            yield from _flat(values, section)


def _flat(value: Any, where: str) -> Iterator[tuple[str, str]]:
    """The leaves of nested objects by dotted names."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{where}.{key}" if where else str(key))
        return
    yield where, value if isinstance(value, str) else json.dumps(value)


def _cut(text: str) -> str:
    """The end of a text, where paths differ, if it is long."""
    return text if len(text) <= _LONGEST else f"…{text[1 - _LONGEST :]}"
