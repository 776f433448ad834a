"""How a request is declared: a dataclass whose fields are flags of the command line and keywords of Python."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from ldit.config.paths import expanded

T = TypeVar("T")

ALIASES, POSITIONAL, TYPE, GROUP, METAVAR = "aliases", "positional", "type", "group", "metavar"
"""Keys of a field's metadata."""
HEADINGS = (
    "Options", "What", "Sampler", "Guidance", "Size", "Set", "Metrics", "Features", "Autoencoder", "Text", "Decoding",
    "Files", "Checkpoint", "Machine",
)  # fmt: skip
"""Headings of help in order; a request's class has one as the first word of its docstring. The sections of a
configuration follow."""


def flag(
    *aliases: str, positional: bool = False, command_line: Any = None, group: str | None = None, metavar: str = ""
) -> dict[str, Any]:
    """Metadata of a field, for what its name, type, default and docstring do not say.

    aliases: other names, on the command line and in Python. positional: an argument without a flag; with aliases it can
    also be given by those, and is positional only as the first argument. command_line: its type on the command line,
    where Python takes more types. group: its heading in help, if not that of the class that declares it.
    """
    given = {ALIASES: aliases, POSITIONAL: positional, TYPE: command_line, GROUP: group, METAVAR: metavar}
    return {key: value for key, value in given.items() if value}


def from_keywords(cls: type[T], keywords: Mapping[str, Any], function: str) -> T:
    """The request with these keywords, which are names or aliases of its fields. TypeError for an unknown one, as for
    any Python function."""
    names = {entry.name: entry.name for entry in fields(cls)}  # type: ignore[arg-type]
    for entry in fields(cls):  # type: ignore[arg-type]
        names |= dict.fromkeys(entry.metadata.get(ALIASES, ()), entry.name)
    values: dict[str, Any] = {}
    for keyword, value in keywords.items():
        if keyword not in names:
            raise TypeError(f"{function}() got an unexpected keyword {keyword!r}{nearest(keyword, names)}")
        if names[keyword] in values:
            raise TypeError(f"{function}() got {names[keyword]!r} twice, by two of its names")
        values[names[keyword]] = value
    return expanded(cls(**values))


def nearest(word: str, known: Iterable[str]) -> str:
    """ " (did you mean …?)" with the known name most similar to a word; "" where none is similar."""
    close = difflib.get_close_matches(word, list(known), 1)
    return f" (did you mean {close[0]}?)" if close else ""


def spelled(name: str) -> str:
    """A field's name as a flag."""
    return f"--{name}".replace("_", "-")
