"""Row C10: one run a directory."""

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from counts import count
from crash.processes import PATIENCE, RUN, STEPS, Job, Server, assert_same, finished, logged, until, verify

pytestmark = [pytest.mark.crash, pytest.mark.timeout(900)]


@pytest.mark.parametrize("case", range(count(5, 20)))
def test_c10_the_second_run_is_refused(
    case: int, server: Server, undisturbed: Callable[[int], Path], tmp_path: Path
) -> None:
    """While one run holds the directory (stopped, so that it surely does) another exits with 2 and one line and leaves
    everything alone. Afterwards the first goes on, or is killed and its lock is not in the way of the next; either way
    the bits are those of a run without rivals."""
    rng, size, rivals = random.Random(case), 1 + case % 2, 1 + case // 2 % 2
    out = tmp_path / "run"
    argv = [*RUN, "--out", str(out)]
    with Job(server, argv, tmp_path / "said", size) as first:
        goal = rng.randint(1, STEPS // 2)
        until(lambda: logged(out) >= goal, PATIENCE, first.said)
        for one in first.ranks:
            assert one.send(signal.SIGSTOP), "done before the rival came"
        time.sleep(0.1)
        before = contents(out)
        with Job(server, argv, tmp_path / "rival", rivals) as second:
            assert second.wait() == [2] * rivals
            (line,) = filter(None, second.said().splitlines())
        assert "in use by another training process" in line and str(out) in line
        assert contents(out) == before
        for one in first.ranks:
            one.send(signal.SIGCONT)
        if case % 3 == 2:
            assert first.wait() == [0] * size, first.said()
        else:
            for one in first.ranks:
                one.send(signal.SIGKILL)
            first.wait()
    if case % 3 != 2:
        finished(server, argv, tmp_path / "said", size)
    assert STEPS in verify(out)
    assert_same(undisturbed(size), out)


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
