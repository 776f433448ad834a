"""Row C1: SIGKILL at a random time, the same command again, until the run is done."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from counts import count
from crash.processes import PATIENCE, ROOT, RUN, STEPS, Job, Server, assert_same, finished, logged, until, verify

pytestmark = [pytest.mark.crash, pytest.mark.timeout(900)]

KILLS = 5  # in a case, so that cases times this is the number of the row


def killed_once(server: Server, out: Path, folder: Path, rng: random.Random) -> bool:
    """Start the run, or go on with it, and kill it: at any time of its start, or some steps after where it stood."""
    before = logged(out)
    with Job(server, [*RUN, "--out", str(out)], folder) as job:
        if rng.random() < 0.25:
            time.sleep(rng.uniform(0.0, 1.0))
        else:
            # Up to five steps are done again before the log grows.
            goal = rng.randint(max(before - 5, 0) + 1, min(before + 8, STEPS))
            until(lambda: _newer(out, goal) or not job.alive(), PATIENCE, job.said)
            time.sleep(rng.uniform(0.0, 0.08))
        return job.ranks[0].send(signal.SIGKILL)


def _newer(out: Path, goal: int) -> bool:
    return logged(out) >= goal


@pytest.mark.parametrize("case", range(count(25, 200) // KILLS))
def test_c1_killed_at_random_it_ends_the_same(
    case: int, server: Server, undisturbed: Callable[[int], Path], tmp_path: Path
) -> None:
    """After each kill every committed step verifies; in the end weights, averages, optimiser state, trainer.json and
    loss log are bit-equal to those of a run that nobody killed."""
    rng, kills, run = random.Random(case), 0, 0
    while kills < KILLS:
        out, run = tmp_path / f"run{run}", run + 1
        while kills < KILLS and killed_once(server, out, tmp_path / "said", rng):
            kills += 1
            verify(out)
        finished(server, [*RUN, "--out", str(out)], tmp_path / "said")
        assert STEPS in verify(out)
        assert_same(undisturbed(1), out)


def test_c1_a_fork_trains_like_the_command(undisturbed: Callable[[int], Path], tmp_path: Path) -> None:
    """The forks these tests kill do what `python -m ldit` does, bit for bit."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "ldit", *RUN, "--out", str(tmp_path / "run")]
    subprocess.run(command, check=True, capture_output=True, env=env, timeout=300)
    assert_same(undisturbed(1), tmp_path / "run")
