"""Every solver's order, measured on a Gaussian mixture whose denoiser is known in closed form, for both processes.

Grids end short of clean data, where the last step of every solver is the estimate itself, of first order in what is
left of the noise, whatever came before.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ldit.diffusion import DDPM, Flow
from ldit.diffusion.process import CLEAN, Denoised, Level
from ldit.sampling.solvers import SOLVERS, find_solver

MEANS, STDS, SHARES = torch.tensor([-1.0, 0.6]), torch.tensor([0.5, 0.4]), torch.tensor([0.4, 0.6])
SPANS = {"flow": (Flow(), 0.95, 0.2), "ddpm": (DDPM(), 0.8, 0.15)}
ORDERS = {"ddim": 1, "euler": 1, "heun": 2, "ab2": 2, "ab3": 3, "ab4": 3, "dpm++2m": 2}
ORDERS |= {"dpm++3m": 2, "unipc2": 3, "unipc3": 3, "unipc2-bh1": 3, "unipc3-bh1": 3}  # at least
STOCHASTIC = ("ddpm", "dpm++2m-sde", "euler-maruyama")
# Steps between which the order is measured: few enough for the error to stand above rounding.
COUNTS = {1: (64, 512), 2: (64, 512), 3: (256, 1024)}


def mixture(x: Tensor, level: Level) -> Denoised:
    """E[x0 | x] and the noise that goes with it."""
    m, s, w = (values.double()[:, None] for values in (MEANS, STDS, SHARES))
    variance = level.alpha**2 * s**2 + level.sigma**2
    logits = w.log() - 0.5 * variance.log() - 0.5 * (x - level.alpha * m) ** 2 / variance
    parts = m + level.alpha * s**2 / variance * (x - level.alpha * m)
    x0 = (logits.softmax(0) * parts).sum(0)
    return Denoised(x0, (x - level.alpha * x0) / level.sigma)


def grid(process: str, count: int) -> list[Level]:
    schedule, high, low = SPANS[process]
    return [schedule.level(high + (low - high) * i / count) for i in range(count + 1)]


def solve(name: str, z: Tensor, levels: list[Level], noise: Callable[[int], Tensor] | None = None) -> Tensor:
    def none(i: int) -> Tensor:
        raise AssertionError("a deterministic solver drew noise")

    *_, step = find_solver(name)(mixture, z, levels, noise or none)
    return step.x


def start(levels: list[Level], count: int = 64) -> Tensor:
    """States as the process has them at the first level."""
    random = torch.Generator().manual_seed(0)
    which = torch.multinomial(SHARES, count, replacement=True, generator=random)
    x0 = MEANS[which] + STDS[which] * torch.randn(count, generator=random)
    return (levels[0].alpha * x0 + levels[0].sigma * torch.randn(count, generator=random)).double()


@pytest.fixture(scope="module")
def exact() -> dict[str, Tensor]:
    """Adams-Bashforth with 4,096 steps, and Heun within its own error of it: two formulas that share nothing."""
    found = {}
    for process in SPANS:
        levels = grid(process, 4096)
        z = start(levels)
        found[process] = solve("ab4", z, levels)
        assert (solve("heun", z, levels) - found[process]).abs().max() < 1e-6
    return found


def test_every_solver_is_measured() -> None:
    assert {*ORDERS, *STOCHASTIC, "dpm++"} == set(SOLVERS) and SOLVERS["dpm++"] is SOLVERS["dpm++2m"]


@pytest.mark.parametrize("process", SPANS)
@pytest.mark.parametrize("name", ORDERS)
def test_order(name: str, process: str, exact: dict[str, Tensor]) -> None:
    few, many = COUNTS[ORDERS[name]]
    errors = []
    for count in (few, many):
        levels = grid(process, count)
        errors.append((solve(name, start(levels), levels) - exact[process]).square().mean().sqrt().item())
    slope = math.log(errors[0] / errors[1]) / math.log(many / few)
    # ab4 and unipc3 start with steps of third order, and reach four while these do not count.
    most = 4 if name == "ab4" or name.startswith("unipc3") else ORDERS[name]
    assert ORDERS[name] - 0.2 <= slope <= most + 0.2, errors


@pytest.mark.parametrize("process", SPANS)
@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_solvers_reach_mean_and_variance(name: str, process: str) -> None:
    """Of the data, from pure noise to clean data."""
    schedule, count = SPANS[process][0], 40_000
    # Fewer where little happens and more towards clean data: a ddpm step has the forward process's variance.
    levels = [schedule.level((1.0 - i / 400) ** 1.5) for i in range(400)]
    levels = [*(level for level in levels if level.noise_time > 0.002), CLEAN]
    random = torch.Generator().manual_seed(1)
    z = torch.randn(count, dtype=torch.float64, generator=random)
    x = solve(name, z, levels, lambda i: torch.randn(count, dtype=torch.float64, generator=random))
    mean = float((SHARES * MEANS).sum())
    std = math.sqrt(float((SHARES * (STDS**2 + MEANS**2)).sum()) - mean**2)
    assert x.mean().item() == pytest.approx(mean, abs=4 * std / math.sqrt(count) + 0.005)
    assert x.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * count) + 0.01)


@pytest.mark.parametrize("process", SPANS)
def test_ddim_draws_as_eta_says(process: str) -> None:
    """Every eta reaches the data's deviation, with a bias that falls as 1/steps (2.5 % at 200, 800 of them 0.6 %); what
    eta 1 draws is sqrt of the posterior's variance."""
    schedule, count = SPANS[process][0], 20_000
    levels = [*(schedule.level(1.0 - 0.999 * i / 300) for i in range(301)), CLEAN]
    random = torch.Generator().manual_seed(2)

    def normal(i: int = 0) -> Tensor:
        return torch.randn(count, dtype=torch.float64, generator=random)

    def gaussian(x: Tensor, level: Level) -> Denoised:
        gain = level.alpha * 0.09 / (level.alpha**2 * 0.09 + level.sigma**2)
        x0 = 0.5 + gain * (x - level.alpha * 0.5)
        return Denoised(x0, (x - level.alpha * x0) / level.sigma)

    for eta in (0.3, 1.0):
        *_, step = find_solver("ddim", eta)(gaussian, normal(), levels, normal)
        assert step.x.mean().item() == pytest.approx(0.5, abs=0.01)
        assert step.x.std().item() == pytest.approx(0.3, rel=0.05)
    a, b = levels[200], levels[201]
    beta = a.sigma**2 - (a.alpha / b.alpha) ** 2 * b.sigma**2
    drawn = torch.zeros(1, dtype=torch.float64)
    with_one, without = (
        next(find_solver("ddim", 1.0)(gaussian, drawn + 0.2, [a, b], lambda i, n=n: drawn + n)).x for n in (1.0, 0.0)
    )
    assert (with_one - without).item() == pytest.approx(math.sqrt(beta) * b.sigma / a.sigma, rel=1e-9)
