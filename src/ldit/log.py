"""Logging: plain lines on stderr."""

import logging
import sys

logger = logging.getLogger("ldit")


def setup() -> None:
    """Print messages of level INFO and above on stderr, without level or time."""
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False


def silence_other_ranks() -> None:
    """Log only errors. For processes other than the main one, which would log the same lines."""
    logger.setLevel(logging.ERROR)
