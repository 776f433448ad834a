"""Grids by name: their levels against their definitions, and what is no grid."""

import math
from itertools import pairwise

import numpy as np
import pytest

from ldit.diffusion import DDPM, Flow
from ldit.diffusion.process import CLEAN
from ldit.errors import RequestError
from ldit.sampling.grids import build_grid

PROCESSES = {"flow": Flow(), "ddpm": DDPM()}
KINDS = ("uniform", "shifted:3", "karras", "cosine")


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("grid", KINDS)
@pytest.mark.parametrize("steps", [1, 2, 10, 50])
def test_from_noise_to_clean_data(process: str, grid: str, steps: int) -> None:
    levels = build_grid(PROCESSES[process], str(steps), grid)
    assert len(levels) == steps + 1 and levels[0].noise_time == 1.0 and levels[-1] is CLEAN
    ratios = [level.sigma / level.alpha if level.alpha else math.inf for level in levels]
    assert all(a > b for a, b in pairwise(ratios))
    for level in levels[:-1]:
        if process == "ddpm":
            assert level.alpha**2 + level.sigma**2 == pytest.approx(1.0)
            assert level.noise_time == pytest.approx((level.time + 1) / 1000) and 0 <= level.time <= 999
        else:
            assert level.alpha + level.sigma == pytest.approx(1.0) and level.time == pytest.approx(1000 * level.sigma)


def test_uniform_is_the_processes_own() -> None:
    assert build_grid(DDPM(), "10,15,20") == tuple(DDPM().own_grid("10,15,20"))
    assert build_grid(Flow(shift=2.0), "7") == tuple(Flow(shift=2.0).own_grid(str(7)))


def test_definitions() -> None:
    shifted = [level.noise_time for level in build_grid(Flow(), "4", "shifted:3")]
    assert shifted == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0])
    for process in PROCESSES.values():
        angles = [math.atan2(level.sigma, level.alpha) for level in build_grid(process, "8", "cosine")]
        assert np.diff(angles) == pytest.approx([-angles[0] / 8] * 8, rel=1e-6)
        roots = [(level.sigma / level.alpha) ** (1 / 7) for level in build_grid(process, "8", "karras")[1:-1]]
        assert np.diff(roots) == pytest.approx([roots[1] - roots[0]] * 6, rel=1e-6)
    last = build_grid(Flow(), "8", "karras")[-2]
    assert last.sigma / last.alpha == pytest.approx(0.002)
    assert build_grid(DDPM(), "8", "karras")[-2].time == pytest.approx(0.0, abs=1e-9)


def test_listed_noise_times() -> None:
    levels = build_grid(Flow(), "99", "1,0.6,.2")
    assert [level.noise_time for level in levels] == [1.0, 0.6, 0.2, 0.0]
    assert [level.time for level in build_grid(DDPM(), "99", "1,0.5005")[:-1]] == pytest.approx([999.0, 499.5])


def test_between_the_indices_of_ddpm() -> None:
    """At whole indices the table's own values; between them log(alpha/sigma) is linear in the index."""
    schedule, table = DDPM(), {level.time: level for level in DDPM().own_grid("1000")[:-1]}
    for index in (0, 1, 500, 998, 999):
        level, own = schedule.level((index + 1) / 1000), table[float(index)]
        assert level.time == pytest.approx(index) and level.noise_time == pytest.approx(own.noise_time)
        assert (level.alpha, level.sigma) == pytest.approx((own.alpha, own.sigma), rel=1e-9)
        assert schedule.level_of_ratio(own.sigma / own.alpha).time == pytest.approx(index, abs=1e-6)
    middle = schedule.level(0.3005)
    assert middle.time == pytest.approx(299.5)
    assert middle.half_logsnr == pytest.approx((table[299.0].half_logsnr + table[300.0].half_logsnr) / 2, rel=1e-9)


@pytest.mark.parametrize(
    ("process", "steps", "grid", "said"),
    [
        ("flow", "0", "uniform", "steps: expected a number from 1"),
        ("flow", "ddim50", "uniform", "steps: expected a number from 1"),
        ("flow", "100001", "cosine", "steps: expected a number from 1"),
        ("ddpm", "1001", "uniform", "steps: "),
        ("ddpm", "10,10", "cosine", "steps: expected a number from 1"),
        ("flow", "10", "parabolic", "grid: expected uniform, shifted:K"),
        ("flow", "10", "", "grid: expected uniform, shifted:K"),
        ("flow", "10", "karras:2", "grid: expected uniform, shifted:K"),
        ("flow", "10", "shifted", "needs a positive number K"),
        ("flow", "10", "shifted:-1", "needs a positive number K"),
        ("flow", "10", "shifted:nan", "needs a positive number K"),
        ("flow", "10", "1,0.5,0.7", "must fall from step to step"),
        ("flow", "10", "1,0.5,0.5", "must fall from step to step"),
        ("flow", "10", "1,0.5,0", "must be above 0 and at most 1"),
        ("flow", "10", "1.5,1", "must be above 0 and at most 1"),
        ("flow", "10", "1,nan", "must be above 0 and at most 1"),
        ("flow", "10", "1,x", "expected noise times"),
        ("ddpm", "10", "1,0.0005,0.0001", "not below 0.001"),
        ("ddpm", "1000", "cosine", "must fall from step to step and not below 0.001"),
    ],
)
def test_what_is_no_grid(process: str, steps: str, grid: str, said: str) -> None:
    with pytest.raises(RequestError) as error:
        build_grid(PROCESSES[process], steps, grid)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("k", [0.08, 0.1, 0.2, 0.41, 0.5, 1.0, 3.0, *(i / 100 for i in range(1, 1000, 7))])
def test_shifted_grids_begin_at_pure_noise(k: float) -> None:
    """Exactly: a level a rounding beyond it has no logarithm, one before it enters polynomials."""
    for levels in (build_grid(Flow(), "4", f"shifted:{k}"), build_grid(Flow(shift=k), "4")):
        assert levels[0].alpha == 0.0 and levels[0].sigma == 1.0
        assert all(0 < level.alpha < 1 for level in levels[1:-1])
