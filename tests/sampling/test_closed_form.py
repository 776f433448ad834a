"""Solvers on a mixture with a known exact solution: none is worse than Euler's method at equal evaluations, and the
published ones are what diffusers computes."""

import math
import sys
from pathlib import Path

import pytest

BENCHMARKS = str(Path(__file__).resolve().parents[2] / "benchmarks")
sys.path.append(BENCHMARKS)
import closed_form  # noqa: E402

sys.path.remove(BENCHMARKS)  # some scripts have the names of folders of tests

COUNTS = (5, 10, 20)


@pytest.mark.parametrize("process", closed_form.PROCESSES)
@pytest.mark.parametrize("grid", closed_form.GRIDS)
def test_no_solver_is_worse_than_euler(grid: str, process: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closed_form, "STARTS", 201)
    target = closed_form.TARGETS["mixture"]
    for count in COUNTS:
        euler = closed_form.error(target, "euler", process, grid, count)
        for solver in closed_form.DETERMINISTIC:
            assert closed_form.error(target, solver, process, grid, count) <= euler * (1 + 1e-9), (solver, count)


def test_the_exact_solution_is_exact() -> None:
    """A solver of many steps goes where the quantiles say."""
    error = closed_form.error(closed_form.TARGETS["mixture"], "ab3", "flow", "uniform", 1000)
    assert error < 1e-5


@pytest.mark.parametrize("solver", closed_form.PEERS)
def test_as_diffusers(solver: str) -> None:
    """Its schedulers keep tables, and some of them states, in fp32: 24 bits, over at most 20 steps."""
    pytest.importorskip("diffusers")
    tolerance = 1e-13 if solver.startswith("unipc") else 20 * 2.0**-24 * math.sqrt(20)
    assert closed_form.peer_difference(solver) < tolerance
