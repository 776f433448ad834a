"""Dataclass <-> JSON, strictly: an unknown or missing key or a value of the wrong type is an error that names it."""

import dataclasses
import reprlib
import types
import typing
from typing import Any, Literal, TypeVar, Union

from ldit.errors import ConfigError

T = TypeVar("T")
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring = 3, 200


def to_dict(value: Any) -> Any:
    """A dataclass tree as plain dicts, lists and scalars."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [to_dict(v) for v in value]
    if isinstance(value, dict):
        return {k: to_dict(v) for k, v in value.items()}
    return value


def from_dict(cls: type[T], data: Any, where: str = "") -> T:
    """Build dataclass `cls` from JSON data; absent keys take the defaults. `where` is the key's path in messages."""
    if not isinstance(data, dict):
        raise _wrong(where or cls.__name__, data, "an object")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values = {}
    for key, value in data.items():
        path = f"{where}.{key}" if where else key
        if key not in fields:
            raise ConfigError(f"unknown key {path!r:.200} (known: {', '.join(fields)})")
        values[key] = convert(hints[key], value, path)
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ConfigError(f"missing key {(where + '.' if where else '') + name!r}")
    return cls(**values)


def convert(hint: Any, value: Any, path: str) -> Any:
    """`value` as the annotated type, or ConfigError. An int is accepted for a float, never a float for an int."""
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(typing.get_args(hint), value, path)
    if hint is Any:
        return value
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in typing.get_args(hint)):
            return value
        raise _wrong(path, value, " or ".join(map(repr, typing.get_args(hint))))
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_dict(hint, value, path)
    if origin in (tuple, list):
        return _convert_sequence(hint, value, path)
    if origin is dict:
        if not isinstance(value, dict):
            raise _wrong(path, value, "an object")
        item = typing.get_args(hint)[1]
        return {str(k): convert(item, v, f"{path}.{k}") for k, v in value.items()}
    return _convert_scalar(hint, value, path)


def _wrong(path: str, value: Any, expected: str) -> ConfigError:
    return ConfigError(f"{path}: expected {expected}, got {show(value)}")


def show(value: Any, limit: int = 80) -> str:
    """The repr of a value from outside, shortened: it may be huge, or contain itself."""
    if not isinstance(value, (str, int, float, list, tuple, dict, set, type(None))):
        return f"a {type(value).__name__}"
    try:
        text = _REPR.repr(value)
    except (ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= limit else text[:limit] + "…"


def _convert_union(choices: tuple[Any, ...], value: Any, path: str) -> Any:
    if value is None and type(None) in choices:
        return None
    options = [choice for choice in choices if choice is not type(None)]
    kinds = {_kind_of(choice): choice for choice in options}
    # A section that may be of several kinds says which one it is.
    if len(options) > 1 and None not in kinds:
        kind = value.get("kind") if isinstance(value, dict) else None
        if not isinstance(kind, str) or kind not in kinds:
            raise ConfigError(f"{path}.kind: expected one of {', '.join(map(str, kinds))}, got {show(kind)}")
        return convert(kinds[kind], value, path)
    # Else the first type that fits.
    errors = []
    for choice in options:
        try:
            return convert(choice, value, path)
        except ConfigError as error:
            errors.append(error)
    raise errors[-1] if len(options) == 1 else _wrong(path, value, " or ".join(map(_name, choices)))


def _kind_of(choice: Any) -> str | None:
    """The value of a dataclass's field `kind`, by which it is recognised in a union; None where it has none."""
    fields = dataclasses.fields(choice) if dataclasses.is_dataclass(choice) else ()
    return next((field.default for field in fields if field.name == "kind"), None)  # type: ignore[return-value]


def _convert_sequence(hint: Any, value: Any, path: str) -> Any:
    if not isinstance(value, (list, tuple)):
        raise _wrong(path, value, "a list")
    items = typing.get_args(hint)
    if typing.get_origin(hint) is list or (len(items) == 2 and items[1] is Ellipsis):
        converted = [convert(items[0], v, f"{path}[{i}]") for i, v in enumerate(value)]
        return converted if typing.get_origin(hint) is list else tuple(converted)
    if len(items) != len(value):
        raise _wrong(path, value, f"{len(items)} values")
    return tuple(convert(item, v, f"{path}[{i}]") for i, (item, v) in enumerate(zip(items, value, strict=True)))


def _convert_scalar(hint: type, value: Any, path: str) -> Any:
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            raise _wrong(path, value, "a finite number") from None
        if number != number or number in (float("inf"), float("-inf")):
            raise _wrong(path, value, "a finite number")
        return number
    if hint is str and isinstance(value, str):
        return value
    raise _wrong(
        path,
        value,
        {int: "an integer", float: "a number", bool: "true or false", str: "a string"}.get(hint, _name(hint)),
    )


def _name(hint: Any) -> str:
    return "null" if hint is type(None) else getattr(hint, "__name__", str(hint))
