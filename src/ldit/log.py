"""Logging: plain lines on stderr."""

import logging
import sys

logger = logging.getLogger("ldit")


def setup() -> None:
    """Messages of level INFO and up go to stderr, bare."""
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False


def silence_other_ranks() -> None:
    """For every process but the main one: only errors are logged, as all would log the same lines."""
    logger.setLevel(logging.ERROR)
