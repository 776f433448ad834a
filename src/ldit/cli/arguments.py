"""Dataclasses to flags through tyro, with every mistake reduced to one line."""

import contextlib
import dataclasses
import io
import re
import typing
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import tyro

from ldit.errors import ConfigError

T = TypeVar("T")
_FRAME = "╭╮╰╯─│ "


def parse(
    cls: type[T], argv: Sequence[str], prog: str, description: str | None = None, default: Any = tyro.MISSING_NONPROP
) -> T:
    """An instance of `cls` from flags; ConfigError with one line when they do not fit. Hyphens and underscores in flags
    are the same. `--help` prints and exits 0."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                cls,
                prog=prog,
                description=description,
                args=_spell_booleans(cls, list(argv)),
                default=default,
                config=(tyro.conf.AvoidSubcommands,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ConfigError(f"{_first_paragraph(said.getvalue())} (see {prog} --help)") from None


def _spell_booleans(cls: type[Any], argv: list[str]) -> list[str]:
    """`--section.flag true|false` as tyro's `--section.flag` / `--section.no-flag`; other values that are spelled so
    (qk_norm) get Python's capital."""
    flags = set(_bool_flags(cls))
    out: list[str] = []
    for token in argv:
        value = token.casefold()
        if value not in ("true", "false") or not out or not out[-1].startswith("--"):
            switch = out[-1].replace("_", "-") if out else ""
            if switch in flags and "." in switch and not token.startswith("--"):  # without a section: a word may follow
                raise ConfigError(f"{out[-1]}: expected true or false, got {token[:80]!r}")
            out.append(token)
        elif out[-1].replace("_", "-") not in flags:
            out.append(value.capitalize())
        elif value == "false":
            section, dot, name = out[-1].removeprefix("--").rpartition(".")
            out[-1] = f"--{section}{dot}no-{name}"
    return out


def _bool_flags(cls: type[Any], prefix: str = "--") -> Iterator[str]:
    """The flags of every plain bool field of a dataclass tree."""
    for name, hint in typing.get_type_hints(cls).items():
        own = prefix + name.replace("_", "-")
        if hint is bool:
            yield own
        for part in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(part) and isinstance(part, type):
                yield from _bool_flags(part, prefix if name == "config" else own + ".")


def _first_paragraph(box: str) -> str:
    """The message of tyro's box, up to its first rule, as one line."""
    lines: list[str] = []
    for line in box.splitlines()[1:]:
        text = re.sub(r"\x1b\[[0-9;]*m", "", line)
        if not text.strip(_FRAME):
            break
        lines.append(text.strip(_FRAME))
    return " ".join(lines) or "the arguments do not fit"
