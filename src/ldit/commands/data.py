"""`ldit data check`: what a set of images holds, and what is wrong with it."""

import json

from ldit.config.requests.data import CheckRequest
from ldit.data.check.report import as_json, as_text, check_data


def run_check(request: CheckRequest) -> int:
    """`ldit data check`; exit code 1 when anything is bad."""
    result = check_data(request)
    if request.json:
        print(json.dumps(as_json(result)))
    else:
        for line in as_text(result):
            print(_printable(line))
    return 0 if result.sound else 1


def _printable(line: str) -> str:
    """File names come from outside: control characters and broken UTF-8 are shown by their codes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
