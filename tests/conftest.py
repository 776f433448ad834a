"""What every test leaves behind as it found it."""

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def own_logger() -> Iterator[None]:
    """`ldit.log.setup` ties the logger to the stderr of its moment: of a test that is over, for the next one."""
    logger = logging.getLogger("ldit")
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)
