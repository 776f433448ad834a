"""Row C9: SIGTERM, SIGINT and SIGUSR1 end a run after a checkpoint, wherever they arrive."""

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from counts import count
from crash.processes import PATIENCE, RUN, STEPS, Job, Server, assert_same, finished, logged, until, verify

pytestmark = [pytest.mark.crash, pytest.mark.timeout(900)]

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 138}


@pytest.mark.parametrize("case", range(count(10, 100)))
def test_c9_a_signal_is_a_checkpoint_and_an_exit_code(
    case: int, server: Server, undisturbed: Callable[[int], Path], tmp_path: Path
) -> None:
    """Sent to one process at a random time: the next step boundary is committed, every process exits with the
    documented code, and the same command goes on to the bits of an undisturbed run."""
    rng, size = random.Random(case), 1 + case % 2
    number, code = list(CODES.items())[case % 3]
    for attempt in range(5):
        out = tmp_path / f"run{attempt}"
        argv = [*RUN, "--out", str(out)]
        with Job(server, argv, tmp_path / "said", size) as job:
            goal = rng.randint(1, STEPS // 2)
            until(lambda goal=goal, out=out: logged(out) >= goal, PATIENCE, job.said)  # type: ignore[misc]
            time.sleep(rng.uniform(0.0, 0.05))
            job.ranks[(case // 2 + 1) % size].send(number)
            seen = logged(out)
            codes = job.wait()
        if seen < STEPS - 1 - size:
            break
    else:
        pytest.fail("the signal came too late five times: the runs were done")
    assert codes == [code] * size, job.said()
    # A signal in step k is known at the end of step k + 1; step k - 1 was in the log by then, or about to be.
    newest = verify(out)[0]
    assert newest == logged(out) and goal <= newest <= seen + 1 + size
    finished(server, argv, tmp_path / "said", size)
    assert_same(undisturbed(size), out)
