"""Logging: plain lines on stderr."""

import logging
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

logger = logging.getLogger("ldit")


class _BesideBars(logging.StreamHandler[Any]):
    """Prints lines above the progress bars that are on the terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm = sys.modules.get("tqdm")
        with _without_bars(tqdm, self.stream) if tqdm is not None else nullcontext():
            super().emit(record)


def _without_bars(tqdm: Any, stream: Any) -> AbstractContextManager[Any]:
    """A context in which tqdm's bars are off the screen."""
    context: AbstractContextManager[Any] = tqdm.tqdm.external_write_mode(file=stream)
    return context


def setup(verbose: bool = False) -> None:
    """Print messages of level INFO and above on stderr, without level or time; with `verbose` also those of DEBUG."""
    if not logger.handlers:
        handler = _BesideBars(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG if verbose else logging.INFO)
        logger.propagate = False


def silence_other_ranks() -> None:
    """Log only errors. For processes other than the main one, which would log the same lines."""
    logger.setLevel(logging.ERROR)
