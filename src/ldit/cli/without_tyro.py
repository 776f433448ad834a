"""Parses the flags of flat requests with argparse, for machines that have torch and not tyro, such as a GPU image."""

import argparse
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ldit.config.requests.fields import ALIASES, POSITIONAL, TYPE, spelled
from ldit.errors import ConfigError

T = TypeVar("T")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def parse_flat(cls: type[T], argv: Sequence[str], prog: str) -> T:
    """An instance of `cls`, whose fields are numbers, words, paths, choices, or several of one kind. ConfigError for
    flags that do not fit, and for a class that has sections."""
    parser, types = _Parser(prog, allow_abbrev=False, argument_default=argparse.SUPPRESS), get_type_hints(cls)
    for entry in fields(cls):  # type: ignore[arg-type]
        kind, many = _kind(entry.metadata.get(TYPE, types[entry.name]))
        if kind is None:
            raise ConfigError(f"{prog}: needs the package tyro (pip install tyro)")
        options: dict[str, Any] = {"nargs": "+"} if many else {}
        if get_origin(kind) is Literal:
            options |= {"choices": get_args(kind), "type": type(get_args(kind)[0])}
        elif kind is not bool:
            options["type"] = kind
        if entry.metadata.get(POSITIONAL):
            parser.add_argument(entry.name, **options)
            continue
        names = [spelled(name) for name in (entry.name, *entry.metadata.get(ALIASES, ()))]
        names = list(dict.fromkeys([*names, *(name.replace("-", "_").replace("__", "--", 1) for name in names)]))
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        missing = entry.default is MISSING and entry.default_factory is MISSING
        parser.add_argument(*names, dest=entry.name, required=missing, **options)
    values = vars(parser.parse_args(list(argv)))
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _kind(kind: Any) -> tuple[Any, bool]:
    """(type of one value, whether there may be several); None as the type of anything else."""
    if get_origin(kind) in (Union, UnionType):
        left = [one for one in get_args(kind) if one is not NoneType]
        return _kind(left[0]) if len(left) == 1 else (None, False)
    if get_origin(kind) is tuple:
        return _kind(get_args(kind)[0])[0], True
    is_value = kind in (int, float, str, bool, Path) or get_origin(kind) is Literal
    return (kind if is_value else None), False
