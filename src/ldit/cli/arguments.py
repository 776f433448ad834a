"""Dataclasses to flags through tyro, with every mistake reduced to one line."""

import contextlib
import io
import re
from collections.abc import Sequence
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
                args=list(argv),
                default=default,
                config=(tyro.conf.AvoidSubcommands,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ConfigError(f"{_first_paragraph(said.getvalue())} (see {prog} --help)") from None


def _first_paragraph(box: str) -> str:
    """The message of tyro's box, up to its first rule, as one line."""
    lines: list[str] = []
    for line in box.splitlines()[1:]:
        text = re.sub(r"\x1b\[[0-9;]*m", "", line)
        if not text.strip(_FRAME):
            break
        lines.append(text.strip(_FRAME))
    return " ".join(lines) or "the arguments do not fit"
