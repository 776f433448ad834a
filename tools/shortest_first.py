"""A pytest plugin: the files whose tests take the shortest time run first; the times are kept in $LDIT_TEST_TIMES.

`tools/mutations.py` uses it, so that a mutant dies in seconds where a short test notices it.
"""

import json
import os
from pathlib import Path
from typing import Any

FILE = Path(os.environ["LDIT_TEST_TIMES"])
_times: dict[str, float] = {}


def _known() -> dict[str, float]:
    """Seconds by test file, of earlier runs."""
    times: dict[str, float] = json.loads(FILE.read_text()) if FILE.exists() else {}
    return times


def pytest_collection_modifyitems(items: list[Any]) -> None:
    known = _known()
    items.sort(key=lambda item: known.get(item.nodeid.split("::")[0], 0.0))  # stable: a file's tests stay together


def pytest_runtest_logreport(report: Any) -> None:
    file = report.nodeid.split("::")[0]
    _times[file] = _times.get(file, 0.0) + report.duration


def pytest_sessionfinish(session: Any, exitstatus: int) -> None:
    """Times of a run that was not stopped early. Only the controller of several workers writes."""
    if not (session.shouldstop or session.shouldfail or hasattr(session.config, "workerinput")):
        FILE.write_text(json.dumps({**_known(), **_times}))
