"""Errors that the user can fix. Each message is one line that names the file, key or number at fault."""

_LIMIT = 1000  # characters: file names and values come from outside


class LditError(Exception):
    """Base of all of them; the command line prints the message alone and exits with `code`."""

    code = 2
    said_elsewhere = False
    """Whether another process of the run prints it."""

    def __init__(self, message: str) -> None:
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(message.split()))
        super().__init__(line if len(line) <= _LIMIT else line[: _LIMIT // 2] + " … " + line[-_LIMIT // 3 :])


class ConfigError(LditError):
    """A configuration key or value that cannot be used."""


class SourceError(LditError):
    """A checkpoint or model source that is missing, damaged or of another kind than asked for."""


class DataError(LditError):
    """Training data that is missing, unreadable or does not fit the model."""


class RequestError(LditError):
    """A sampling request that the model cannot serve."""


class CodecError(LditError):
    """The codec that turns latents into images was not found, or is not what the model needs."""


class EvaluationError(LditError):
    """Images, statistics or an extractor that no metric can be computed from."""


class RunError(LditError):
    """A run that failed: nothing in its command is wrong, so the exit code is 1."""

    code = 1
