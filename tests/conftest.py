"""What every test leaves behind as it found it."""

import logging
import os
from collections.abc import Iterator

import pytest
import torch

# Each worker of pytest its share of the cores, and what it starts too: threads of two workers beside each other spin
# for the same cores, and a test of small tensors takes fifty times as long.
SHARE = max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
torch.set_num_threads(SHARE)
os.environ.setdefault("OMP_NUM_THREADS", str(SHARE))


@pytest.fixture(autouse=True)
def own_logger() -> Iterator[None]:
    """`ldit.log.setup` ties the logger to the stderr of its moment: of a test that is over, for the next one."""
    logger = logging.getLogger("ldit")
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is remembered between runs is not remembered in the home folder, nor taken from there."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("XDG_CACHE_HOME")
    if before is not None:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums of one thread have one order: for tests that compare bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
