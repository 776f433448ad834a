"""Row H1: one process stalls; no process waits for it for ever, and the run says which one it is."""

import re
import signal
import time
from pathlib import Path

import pytest
from crash.processes import PATIENCE, RUN, SMALL, Job, Server, logged, until, verify

pytestmark = [pytest.mark.crash, pytest.mark.timeout(600)]

TIMEOUT, GRACE = 5.0, 15.0
STALLS = [  # what stalls, at which step (or after how many tensors), processes, the one, last step in the log
    ("data", 6, 2, 1, 5),
    ("loss", 7, 4, 2, 6),
    ("save", 2, 2, 0, 10),  # the save of step 5 is beside training: it is waited for at step 10
    ("save", 2, 4, 3, 10),
]
STALLED = re.compile(r"process (\d+) stalls")


@pytest.mark.parametrize(("what", "at", "size", "rank", "last"), STALLS)
def test_h1_a_stalled_process_is_named_and_all_end(
    what: str, at: int, size: int, rank: int, last: int, server: Server, tmp_path: Path
) -> None:
    """All exit with a code other than 0 within the timeout and 15 s. Every process that says who stalls names the right
    one, and at least one of them nobody else: those that speak later see the others already gone."""
    out = tmp_path / "run"
    argv = [*RUN, "--parallel.timeout", f"{TIMEOUT:g}", "--out", str(out)]
    with Job(server, argv, tmp_path / "said", size, {rank: (what, at)}, SMALL) as job:
        until(lambda: logged(out) >= last, PATIENCE, job.said)
        began = time.monotonic()
        codes = job.wait(TIMEOUT + GRACE)
        assert time.monotonic() - began <= TIMEOUT + GRACE
        assert 0 not in codes, codes
        assert logged(out) == last
        told = [set(STALLED.findall(line)) for line in job.said().splitlines() if STALLED.search(line)]
        assert {str(rank)} in told and all(str(rank) in named for named in told), job.said()
    verify(out)


def test_h1_a_frozen_process_is_named_by_the_others(server: Server, tmp_path: Path) -> None:
    """A process that is stopped altogether (a machine that hangs) cannot end itself: the others do, and name it."""
    out = tmp_path / "run"
    argv = [*RUN, "--parallel.timeout", f"{TIMEOUT:g}", "--out", str(out)]
    with Job(server, argv, tmp_path / "said", 2) as job:
        until(lambda: logged(out) >= 3, PATIENCE, job.said)
        job.ranks[1].send(signal.SIGSTOP)
        assert job.ranks[0].wait(TIMEOUT + GRACE) != 0
        assert STALLED.findall(job.said()) == ["1"] and "does not answer" in job.said()
        job.ranks[1].send(signal.SIGCONT)
        assert job.ranks[1].wait(TIMEOUT + GRACE) != 0
    verify(out)
