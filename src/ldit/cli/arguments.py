"""Parses flags into a request or a configuration with tyro; every mistake is one line."""

import contextlib
import dataclasses
import io
import os
import re
import typing
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, TypeVar

from ldit.config.paths import expanded
from ldit.config.requests.fields import ALIASES, METAVAR, POSITIONAL, TYPE, nearest, spelled
from ldit.errors import ConfigError, LditError

T = TypeVar("T")
_FRAME = "╭╮╰╯─│ "


def parse(cls: type[T], argv: Sequence[str], prog: str, description: str | None = None, default: Any = None) -> T:
    """An instance of `cls` from flags; ConfigError with one line when they do not fit. Hyphens and underscores in flags
    mean the same. `--help` prints the help and exits with 0. `default`: for a configuration, the instance whose values
    are the defaults."""
    if {"-h", "--help"} & set(argv):
        from ldit.cli.help import help_text

        print(help_text(cls, prog, description, default))
        raise SystemExit(0)
    with mistakes_once():
        return _parse(cls, argv, prog, default)


def _parse(cls: type[T], argv: Sequence[str], prog: str, default: Any) -> T:
    try:
        import tyro  # takes a tenth of a second, which help saves
    except ImportError:
        from ldit.cli.without_tyro import parse_flat

        return expanded(parse_flat(cls, argv, prog))
    # tyro prints its errors in a box and exits: take the first paragraph of it as the message.
    arguments = _spell_booleans(cls, _name_first(cls, list(argv)))
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            values = tyro.cli(
                for_tyro(cls),
                prog=prog,
                args=arguments,
                default=tyro.MISSING_NONPROP if default is None else default,
                config=(tyro.conf.AvoidSubcommands,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        message = _unknown_flag(cls, argv, default) or _first_paragraph(printed.getvalue())
        raise ConfigError(f"{message} (see {prog} --help)") from None
    return expanded(values if isinstance(values, cls) else cls(**vars(values)))


@contextlib.contextmanager
def mistakes_once() -> Iterator[None]:
    """Let only the first process of each machine print a mistake in the arguments: the others make the same."""
    try:
        yield
    except LditError as error:
        error.said_elsewhere = os.environ.get("LOCAL_RANK", "0") != "0"
        raise


def for_tyro(cls: type[Any]) -> type[Any]:
    """The class, or if its fields have metadata, a class that says the same by tyro's annotations."""
    import tyro

    if not any(entry.metadata for entry in dataclasses.fields(cls)):
        return cls
    hints, described = typing.get_type_hints(cls), []
    for entry in dataclasses.fields(cls):
        hint: Any = entry.metadata.get(TYPE, hints[entry.name])
        aliases = entry.metadata.get(ALIASES, ())
        marks: list[Any] = []
        if entry.metadata.get(POSITIONAL) and not aliases:
            marks = [tyro.conf.Positional, tyro.conf.arg(metavar=entry.metadata.get(METAVAR) or entry.name.upper())]
        elif aliases:
            marks = [tyro.conf.arg(aliases=[spelled(name) for name in aliases])]
        for mark in marks:
            hint = Annotated[hint, mark]
        described.append((entry.name, hint, dataclasses.field(default=entry.default, kw_only=True)))
    return dataclasses.make_dataclass(cls.__name__, described)


def _name_first(cls: type[Any], argv: list[str]) -> list[str]:
    """The arguments with a flag put before the first one, for a field that can be given either way."""
    for entry in dataclasses.fields(cls):
        aliases = entry.metadata.get(ALIASES, ())
        if entry.metadata.get(POSITIONAL) and aliases and argv and not argv[0].startswith("-"):
            return [spelled(aliases[0]), *argv]
    return argv


def _unknown_flag(cls: type[Any], argv: Sequence[str], default: Any) -> str | None:
    """A message with the first flag that does not exist, and the most similar one; None if all exist."""
    from ldit.cli.help import rows

    known = {name for row in rows(cls, default) for name in row.flags}
    for token in argv:
        name = token.partition("=")[0].replace("_", "-")
        if token.startswith("--") and len(token) > 2 and name not in known:
            return f"unknown flag {token.partition('=')[0]}{nearest(name, sorted(known))}"
    return None


def _spell_booleans(cls: type[Any], argv: list[str]) -> list[str]:
    """Rewrite `--section.flag true|false` as tyro's `--section.flag` / `--section.no-flag`. For other fields that take
    true and false (qk_norm) these words get Python's capital letter."""
    flags = set(_bool_flags(cls))
    out: list[str] = []
    for token in argv:
        value = token.casefold()
        if value not in ("true", "false") or not out or not out[-1].startswith("--"):
            switch = out[-1].replace("_", "-") if out else ""
            # After a flag without a section a word may follow: an argument of its own.
            if switch in flags and "." in switch and not token.startswith("--"):
                raise ConfigError(f"{out[-1]}: expected true or false, got {token[:80]!r}")
            out.append(token)
        elif out[-1].replace("_", "-") not in flags:
            out.append(value.capitalize())
        elif value == "false":
            section, dot, name = out[-1].removeprefix("--").rpartition(".")
            out[-1] = f"--{section}{dot}no-{name}"
    return out


def _bool_flags(cls: type[Any], prefix: str = "--") -> Iterator[str]:
    """The flags of all bool fields of a dataclass tree."""
    for name, hint in typing.get_type_hints(cls).items():
        own = prefix + name.replace("_", "-")
        if hint is bool:
            yield own
        for part in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(part) and isinstance(part, type):
                yield from _bool_flags(part, prefix if name == "config" else own + ".")


def _first_paragraph(box: str) -> str:
    """The message in tyro's box, up to its first empty line, as one line."""
    lines: list[str] = []
    for line in box.splitlines()[1:]:
        text = re.sub(r"\x1b\[[0-9;]*m", "", line)
        if not text.strip(_FRAME):
            break
        lines.append(text.strip(_FRAME))
    return " ".join(lines) or "the arguments do not fit"
