"""Row C2: SIGKILL of one process of several; half of the kills hit a save."""

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from counts import count
from crash.processes import (
    PATIENCE,
    RUN,
    SMALL,
    STEPS,
    Job,
    Server,
    assert_same,
    finished,
    logged,
    saving,
    until,
    verify,
)

pytestmark = [pytest.mark.crash, pytest.mark.timeout(900)]

WITHIN = 15.0  # seconds in which the others have to end


def strike(job: Job, out: Path, rng: random.Random, during_save: bool) -> bool:
    """Kill one process, at a random step or while a checkpoint is half written; False when the run was done before.

    From step 1 on: before the processes have met none of them can know of another, and whoever started them ends them
    (torchrun at once, srun after its --wait).
    """
    victim = rng.choice(job.ranks)
    goal = rng.randint(1, STEPS - 10)
    until(lambda: logged(out) >= goal or not job.alive(), PATIENCE, job.said)
    if during_save:
        until(lambda: saving(out) or not job.alive(), PATIENCE, job.said)
        time.sleep(rng.uniform(0.0, 0.03))
    else:
        time.sleep(rng.uniform(0.0, 0.1))
    return victim.send(signal.SIGKILL)


@pytest.mark.parametrize("case", range(count(6, 50)))
def test_c2_one_killed_all_end(case: int, server: Server, undisturbed: Callable[[int], Path], tmp_path: Path) -> None:
    """All others exit with a code other than 0 within 15 s; what is committed verifies; the same command goes on to
    the bits of a run that nobody disturbed."""
    rng, size, during_save = random.Random(case), (2, 4, 3)[case // 2 % 3], case % 2 == 0
    for attempt in range(5):
        out = tmp_path / f"run{attempt}"
        argv = [*RUN, "--out", str(out)]
        with Job(server, argv, tmp_path / "said", size, file_bytes=SMALL) as job:
            struck = strike(job, out, rng, during_save)
            began = time.monotonic()
            codes = job.wait(WITHIN if struck else PATIENCE)
            assert time.monotonic() - began <= WITHIN
        if struck and -signal.SIGKILL in codes:
            break
    else:
        pytest.fail("five runs were done before one of their processes could be killed")
    assert sorted(codes)[0] == -signal.SIGKILL and codes.count(-signal.SIGKILL) == 1
    assert 0 not in codes, codes
    verify(out)
    finished(server, argv, tmp_path / "said", size)
    assert STEPS in verify(out)
    assert_same(undisturbed(size), out)


@pytest.mark.parametrize(("size", "rank"), [(2, 1), (4, 0)])
def test_c2_one_fails_all_end(size: int, rank: int, server: Server, tmp_path: Path) -> None:
    """A process that meets an error of its own, just after a checkpoint was begun, does not wait for the others nor
    they for it: all exit with a code other than 0 within 15 s, and the error is told."""
    out = tmp_path / "run"
    with Job(server, [*RUN, "--out", str(out)], tmp_path / "said", size, {rank: ("fail", 6)}, SMALL) as job:
        until(lambda: logged(out) >= 5 or not job.alive(), PATIENCE, job.said)
        codes = job.wait(WITHIN)
        assert 0 not in codes, codes
        assert "injected" in job.ranks[rank].said()
    verify(out)
