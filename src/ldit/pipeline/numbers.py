"""Numbers of a request: Python callers may give any type."""

import operator
from typing import Any

from ldit.errors import RequestError

NO_NUMBER = (TypeError, ValueError, RuntimeError, OverflowError)  # errors of float(), also of tensors


def as_int(name: str, value: Any) -> int:
    """`value` as an int; it may be an integer of any type, but no bool. RequestError names the argument."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except (TypeError, ValueError, RuntimeError):  # tensors raise any of these
        pass
    raise RequestError(f"{name}: expected a whole number, got {value!r:.80}")


def as_float(name: str, value: Any) -> float:
    """`value` as a float; it may be a number of any type. RequestError names the argument."""
    try:
        return float(value)
    except NO_NUMBER:
        raise RequestError(f"{name}: expected a number, got {value!r:.80}") from None
