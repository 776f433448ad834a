"""`~` in paths: expanded once, where a request or a configuration comes in."""

import operator
import os
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

T = TypeVar("T")


def expanded(value: T) -> T:
    """The value with the home folder in place of a leading `~`: in a path, in a text that can only be one ("~/…"), and
    in those of a tuple, list or dataclass. Everything else is returned as it is."""
    return cast(T, _expanded(value))


def _expanded(value: Any) -> Any:
    if isinstance(value, Path):
        return Path(os.path.expanduser(value)) if str(value).startswith("~") else value
    if isinstance(value, str):
        return os.path.expanduser(value) if value == "~" or value.startswith("~/") else value
    if type(value) in (tuple, list):
        parts = [_expanded(part) for part in value]
        return value if all(map(operator.is_, parts, value)) else type(value)(parts)
    if is_dataclass(value) and not isinstance(value, type):
        own = {entry.name: getattr(value, entry.name) for entry in fields(value) if entry.init}
        changed = {name: new for name, old in own.items() if (new := _expanded(old)) is not old}
        return replace(value, **changed) if changed else value
    return value
