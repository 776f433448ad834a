"""Help of a command, made from names, types, defaults and docstrings of the fields of its request."""

import ast
import inspect
import os
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from ldit.config.requests.fields import ALIASES, GROUP, HEADINGS, METAVAR, POSITIONAL, TYPE, spelled

INDENT = 22
NARROWEST = 60  # columns below which help is not folded further
_WORDS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}


@dataclass(frozen=True)
class Row:
    """One argument of a command, as help lists it."""

    group: str
    flags: tuple[str, ...]
    """All its names, such as "--steps"; none for an argument without a flag."""
    metavar: str
    text: str
    required: bool = False
    is_first: bool = False
    """Whether it can be given without a flag, as the first argument."""

    @property
    def head(self) -> str:
        """Flags and metavar, as help shows them."""
        return " ".join(filter(None, (", ".join(self.flags), self.metavar)))


def rows(cls: type[Any], default: Any = None) -> list[Row]:
    """The arguments of a request, or of a tree of sections whose values `default` holds."""
    return list(_rows(cls, default, "", ""))


def _rows(cls: type[Any], default: Any, prefix: str, section: str) -> Iterator[Row]:
    """The arguments of `cls`; `prefix` comes before their names, `section` is the heading they belong to."""
    docs = docstrings(cls)
    hints = typing.get_type_hints(cls)
    for entry in fields(cls):
        value = _default_of(entry, default)
        hint = entry.metadata.get(TYPE, hints[entry.name])
        if is_dataclass(value) and not isinstance(value, type):
            # A section: its fields are --section.field; those of the whole configuration have no prefix.
            inner = prefix if entry.name == "config" else f"{prefix}{entry.name}."
            yield from _rows(type(value), value, inner, inner.rstrip("."))
            continue
        if _has_no_flag(hint, value):
            continue
        group = section or entry.metadata.get(GROUP) or _declared_in(cls, entry.name)
        yield _row(entry, hint, value, prefix, group, docs.get(entry.name, ""))


def _has_no_flag(hint: Any, value: Any) -> bool:
    """Whether a field cannot be set by a flag: the kind of a section, which has one value, an absent section, or a
    list of sections, which a recipe sets."""
    if typing.get_origin(hint) is Literal:
        return len(typing.get_args(hint)) == 1
    return (value is None or isinstance(value, tuple)) and any(map(is_dataclass, typing.get_args(hint)))


def _row(entry: "Field[Any]", hint: Any, value: Any, prefix: str, group: str, doc: str) -> Row:
    """The row of one field, whose default is `value`."""
    metavar = entry.metadata.get(METAVAR) or metavar_of(hint)
    aliases = entry.metadata.get(ALIASES, ())
    if entry.metadata.get(POSITIONAL):
        metavar = entry.metadata.get(METAVAR) or entry.name.upper().replace("_", "-")
        flags = tuple(spelled(name) for name in aliases)
        return Row(
            group,
            flags,
            metavar,
            f"{doc} As the first argument it needs no {flags[0]}." if flags else doc,
            required=value is MISSING,
            is_first=True,
        )
    flags = tuple(spelled(f"{prefix}{name}") for name in (entry.name, *aliases))
    if hint is bool:
        # A flag that is off by default is shown by its name alone, others with both forms.
        if prefix or value:
            return Row(group, (*flags, spelled(f"{prefix}no-{entry.name}")), "", f"{doc} {_default_words(value)}")
        return Row(group, flags, "", doc)
    return Row(group, flags, metavar, f"{doc} {_default_words(value)}".strip(), value is MISSING)


def _default_of(entry: "Field[Any]", default: Any) -> Any:
    """The value of a field in `default`, else the field's own default; MISSING where it is required."""
    if default is not None and not isinstance(default, type) and hasattr(default, entry.name):
        value = getattr(default, entry.name)
        return value if is_dataclass(value) or _is_plain(value) else MISSING
    if entry.default_factory is not MISSING:
        return entry.default_factory()
    return entry.default


def _is_plain(value: Any) -> bool:
    """Whether help can show the value; tyro marks a missing one by an object of its own."""
    return value is None or isinstance(value, (bool, int, float, str, Path, tuple, list))


def _default_words(value: Any) -> str:
    """The default in words; "" where there is none, or where the docstring describes it."""
    if value is MISSING or value is None or value in ("", (), []):
        return "" if value is not MISSING else "(required)"
    if isinstance(value, bool):
        return f"(default: {'on' if value else 'off'})"
    if isinstance(value, (tuple, list)):
        return f"(default: {' '.join(map(str, value))})"
    return f"(default: {value})"


def metavar_of(hint: Any) -> str:
    """N, X, TEXT, PATH, {a,b} or several of them. None is left out: the docstring says what it means."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return metavar_of(parts[0])
    if origin is Literal:
        return "{" + ",".join(map(str, parts)) + "}"
    if origin in (typing.Union, types.UnionType):
        words = list(dict.fromkeys(metavar_of(part) for part in parts if part is not type(None)))
        return "|".join(words)
    if origin is tuple and Ellipsis in parts:
        return f"[{metavar_of(parts[0])} …]"
    if origin is tuple:
        return " ".join(metavar_of(part) for part in parts)
    if hint is bool:
        return "{true,false}"
    return _WORDS.get(hint, "VALUE")


def _declared_in(cls: type[Any], name: str) -> str:
    """The heading of the class that first declares a field."""
    owner = next(base for base in reversed(cls.__mro__) if name in inspect.get_annotations(base))
    return heading(owner)


def heading(cls: type[Any]) -> str:
    """The words of a class's docstring before a colon, if they are one of the headings; else the first heading."""
    first = (cls.__doc__ or "").partition(":")[0]
    return first if first.split(" (")[0] in HEADINGS else HEADINGS[0]


def docstrings(cls: type[Any]) -> dict[str, str]:
    """The string below each field of a dataclass and of those it inherits from, as one line."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not is_dataclass(base):
            continue
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        except OSError:  # a class that was made at run time has no source
            continue
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            match field, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(doc))):
                    texts[name] = " ".join(doc.split())
    return texts


def help_text(cls: type[Any], prog: str, description: str | None = None, default: Any = None) -> str:
    """The help of a command: usage, what it does, and its arguments under their headings."""
    # Usage and description.
    width, bold = min(max(shutil.get_terminal_size((100, 24)).columns, NARROWEST), 120), _bold()
    listed = rows(cls, default)
    first = [row.metavar for row in listed if row.is_first]
    needed = [f"{row.flags[0]} {row.metavar}" for row in listed if row.required and not row.is_first]
    blocks = [" ".join(["usage:", prog, *first, *needed, "[flags]"])]
    if description is None and heading(cls) == HEADINGS[0]:
        description = " ".join((cls.__doc__ or "").removeprefix(f"{HEADINGS[0]}: ").split())
    if description:
        blocks.append("\n".join(_filled(paragraph, width, "") for paragraph in description.splitlines()))
    # The arguments under their headings, required ones first.
    sections = _section_texts(default)
    for group in sorted(dict.fromkeys(row.group for row in listed), key=_place):
        lines = [bold(group)]
        if group in sections:
            lines.append(_filled(sections[group], width, "  "))
        own = [row for row in listed if row.group == group]
        lines += [_entry(row, width) for row in sorted(own, key=lambda row: (not row.is_first, not row.required))]
        blocks.append("\n".join(lines))
    blocks.append("-h, --help prints this; --debug shows the traceback of an error. Underscores in flags are hyphens.")
    return "\n\n".join(blocks)


def _place(group: str) -> int:
    word = group.split(" ")[0]
    return HEADINGS.index(word) if word in HEADINGS else len(HEADINGS)


def _entry(row: Row, width: int) -> str:
    """An argument: its names, and its text beside or below them."""
    head = f"  {row.head}"
    if not row.text:
        return head
    if len(head) > INDENT - 2:
        return f"{head}\n{_filled(row.text, width, ' ' * INDENT)}"
    return f"{head:<{INDENT}}{_filled(row.text, width, ' ' * INDENT).lstrip()}"


def _filled(text: str, width: int, indent: str) -> str:
    if text.startswith("  "):  # a row of a table
        return text
    return textwrap.fill(
        text, width, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _section_texts(default: Any, prefix: str = "") -> dict[str, str]:
    """Section -> the first paragraph of the docstring of its class."""
    texts: dict[str, str] = {}
    for entry in fields(default) if is_dataclass(default) else ():
        value = getattr(default, entry.name)
        if is_dataclass(value) and not isinstance(value, type):
            name = prefix if entry.name == "config" else f"{prefix}{entry.name}"
            texts[name] = " ".join((type(value).__doc__ or "").split("\n\n")[0].split())
            texts |= _section_texts(value, f"{name}." if name else "")
    return texts


def _bold() -> Callable[[str], str]:
    """The function that makes a heading bold, where stdout is a terminal."""
    is_terminal = sys.stdout is not None and sys.stdout.isatty() and "NO_COLOR" not in os.environ
    return (lambda text: f"\033[1m{text}\033[0m") if is_terminal else (lambda text: text)
