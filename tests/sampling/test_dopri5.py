"""The adaptive solver: as exact as its tolerance, no more evaluations than needed, one step for each interval."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ldit.diffusion import DDPM, Flow
from ldit.diffusion.process import Denoised, Level, Process
from ldit.errors import RequestError
from ldit.sampling.grids import build_grid
from ldit.sampling.solvers import find_solver

MEANS, STDS, SHARES = torch.tensor([-1.0, 0.6]), torch.tensor([0.5, 0.4]), torch.tensor([0.4, 0.6])
PROCESSES: dict[str, Process] = {"flow": Flow(), "sit": Flow(time_scale=1.0, data_at=1), "ddpm": DDPM()}


def mixture(x: Tensor, level: Level) -> Denoised:
    m, s, w = (values.double().view(-1, 1, 1) for values in (MEANS, STDS, SHARES))
    variance = level.alpha**2 * s**2 + level.sigma**2
    logits = w.log() - 0.5 * variance.log() - 0.5 * (x - level.alpha * m) ** 2 / variance
    x0 = (logits.softmax(0) * (m + level.alpha * s**2 / variance * (x - level.alpha * m))).sum(0)
    return Denoised(x0, (x - level.alpha * x0) / level.sigma)


def solve(name: str, process: Process, steps: int, **options: Any) -> tuple[list[Any], int]:
    count = 0

    def denoise(x: Tensor, level: Level) -> Denoised:
        nonlocal count
        count += 1
        return mixture(x, level)

    z = torch.randn(4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    levels = build_grid(process, str(steps))
    return list(find_solver(name, process=process, **options)(denoise, z, levels, lambda i: z)), count


@pytest.mark.parametrize("name", PROCESSES)
def test_within_its_tolerance(name: str) -> None:
    """SiT's tolerances, against 2,000 steps of third order (DDPM: all its 1,000, both end at its lowest level)."""
    process = PROCESSES[name]
    exact, _ = solve("ab3", process, 1000 if name == "ddpm" else 2000)
    found, count = solve("dopri5", process, 50)
    assert (found[-1].x - exact[-1].x).abs().max() < 1e-4 and count < 80
    finer, more = solve("dopri5", process, 50, tolerance=1e-6)
    assert (finer[-1].x - exact[-1].x).abs().max() < 1e-5 and more > count


def test_a_step_for_each_interval_of_the_grid() -> None:
    """Whatever steps it takes itself: progress and previews have the grid's states."""
    fine, _ = solve("ab3", Flow(), 2000)
    for steps in (1, 7, 50):
        found, _ = solve("dopri5", Flow(), steps)
        assert [step.number for step in found] == list(range(steps))
        for step in found[:-1]:
            same = fine[(step.number + 1) * 2000 // steps - 1]
            if 2000 % steps == 0:
                assert (step.x - same.x).abs().max() < 1e-2


def test_a_jump_does_not_stop_it() -> None:
    """Guidance that switches on and off at a noise time, and an estimate of noise: the shortest step is bounded."""
    count = 0

    def denoise(x: Tensor, level: Level) -> Denoised:
        nonlocal count
        count += 1
        d = mixture(x, level)
        x0 = d.x0 * (3.0 if level.noise_time > 0.4 else 1.0)
        return Denoised(x0, (x - level.alpha * x0) / level.sigma)

    z = torch.randn(1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    *_, step = find_solver("dopri5", process=Flow())(denoise, z, build_grid(Flow(), "10"), lambda i: z)
    assert step.x.isfinite().all() and count < 400
    # A step over the jump is made again, shorter: accepted as it was it would err by 0.5.
    *_, exact = find_solver("euler")(denoise, z, build_grid(Flow(), "4000"), lambda i: z)
    *_, step = find_solver("dopri5", process=Flow(), tolerance=1e-4)(denoise, z, build_grid(Flow(), "10"), lambda i: z)
    assert (step.x - exact.x).abs().max() < 0.01
    rough = torch.Generator().manual_seed(1)

    def noisy(x: Tensor, level: Level) -> Denoised:
        nonlocal count
        count += 1
        x0 = torch.randn(x.shape, dtype=torch.float64, generator=rough)
        return Denoised(x0, (x - level.alpha * x0) / level.sigma)

    count = 0
    *_, step = find_solver("dopri5", process=Flow())(noisy, z, build_grid(Flow(), "10"), lambda i: z)
    assert step.x.isfinite().all() and count <= 1 + 6 * 10_000 * 2


def test_what_it_needs() -> None:
    with pytest.raises(RequestError, match="dopri5: it needs the process"):
        find_solver("dopri5")
    with pytest.raises(RequestError, match="tolerance: must be 1e-6 to 1, got 0"):
        find_solver("dopri5", tolerance=0.0, process=Flow())
    with pytest.raises(RequestError, match=r"tolerance 0\.1: only solver 'dopri5' takes it, got 'heun'"):
        find_solver("heun", tolerance=0.1)
