"""Errors the user can fix: each message is one line that names the file, key or number at fault."""

import re
from collections.abc import Sequence
from typing import Any

_LIMIT = 1000  # characters: file names and values from outside may be long


def brief(value: Any) -> str:
    """A value for a message, shortened to 80 characters; a fingerprint to its first twelve digits."""
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value):
        return value[:12]
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def some(names: Sequence[str], most: int = 6) -> str:
    """The first names of a list, and how many more there are."""
    more = f", … and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


class LditError(Exception):
    """Base class of these errors. The command line prints the message alone and exits with `code`."""

    code = 2
    said_elsewhere = False
    """Whether another process of the run prints this error."""

    def __init__(self, message: str) -> None:
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(message.split()))
        super().__init__(line if len(line) <= _LIMIT else line[: _LIMIT // 2] + " … " + line[-_LIMIT // 3 :])


class ConfigError(LditError):
    """A configuration key or value that cannot be used."""


class SourceError(LditError):
    """A checkpoint or model source that is missing, damaged or of the wrong kind."""


class DataError(LditError):
    """Training data that is missing, unreadable or does not fit the model."""


class RequestError(LditError):
    """A request that cannot be carried out, such as a sampling option that the model does not support."""


class CodecError(LditError):
    """The codec that turns latents into images is not found, or cannot be used."""


class EvaluationError(LditError):
    """Images, statistics or an extractor from which no metric can be computed."""


class RunError(LditError):
    """A run that failed although its command is right. The exit code is 1."""

    code = 1
