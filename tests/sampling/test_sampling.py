"""Solvers on closed-form denoisers, grids, guidance."""

import math

import pytest
import torch
from torch import Tensor

from ldit.diffusion import DDPM, Flow
from ldit.diffusion.process import CLEAN, Denoised, Level
from ldit.errors import RequestError
from ldit.sampling.denoiser import Denoiser
from ldit.sampling.guidance import Guided
from ldit.sampling.solvers import find_solver

MEAN, STD = 0.5, 0.3


def gaussian(x: Tensor, level: Level) -> Denoised:
    """The exact denoiser of data N(MEAN, STD²)."""
    gain = level.alpha * STD**2 / (level.alpha**2 * STD**2 + level.sigma**2)
    x0 = MEAN + gain * (x - level.alpha * MEAN)
    return Denoised(x0, (x - level.alpha * x0) / level.sigma)


def no_noise(i: int) -> Tensor:
    raise AssertionError("a deterministic solver drew noise")


def last(solver: str, denoise: Denoiser, z: Tensor, levels: list[Level], noise: object = no_noise) -> Tensor:
    *_, step = find_solver(solver)(denoise, z, levels, noise)  # type: ignore[arg-type]
    return step.x


@pytest.mark.parametrize(("solver", "tolerance"), [("ddim", 0.02), ("heun", 0.02)])
def test_deterministic_solvers_on_ddpm(solver: str, tolerance: float) -> None:
    z = torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    error = last(solver, gaussian, z, DDPM().own_grid("250")) - (MEAN + STD * z)
    assert error.abs().max() < tolerance


@pytest.mark.parametrize("levels", [DDPM().own_grid("250"), Flow().own_grid(str(250))], ids=["ddpm", "flow"])
def test_ancestral_sampling_reaches_the_right_distribution(levels: list[Level]) -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(20_000, dtype=torch.float64, generator=generator)

    def noise(i: int) -> Tensor:
        return torch.randn(20_000, dtype=torch.float64, generator=generator)

    x = last("ddpm", gaussian, z, levels, noise)
    assert x.mean().item() == pytest.approx(MEAN, abs=4 * STD / math.sqrt(20_000))
    assert x.std().item() == pytest.approx(STD, rel=0.05)  # the fixed large variance at 250 steps


def test_ddpm_grid() -> None:
    levels = DDPM().own_grid("10")
    assert [level.time for level in levels[:-1]] == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]
    assert levels[0].noise_time == 1.0 and levels[-2].noise_time == 0.001 and levels[-1] is CLEAN
    assert all(level.alpha**2 + level.sigma**2 == pytest.approx(1.0) for level in levels)
    assert [level.time for level in DDPM().own_grid("1")] == [999.0, pytest.approx(math.nan, nan_ok=True)]
    with pytest.raises(ValueError, match="1001"):
        DDPM().own_grid("1001")


def test_flow_grid() -> None:
    levels = Flow(shift=3.0).own_grid(str(4))
    assert [level.noise_time for level in levels] == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0])
    assert levels[1].time == pytest.approx(900.0)
    sit = Flow(time_scale=1.0, data_at=1).own_grid(str(4))
    assert [level.time for level in sit[:-1]] == pytest.approx([0.0, 0.25, 0.5, 0.75])


def test_guidance_on_channels_and_interval() -> None:
    """Outside the interval the null rows are not computed; unguided channels are the conditional half's own."""
    batches = []

    def network(x: Tensor, time: Tensor, y: Tensor) -> Tensor:
        batches.append(len(x))
        return y.view(-1, 1, 1, 1).float().expand(len(x), 4, 1, 1)

    cond, null = torch.tensor([1, 2]), torch.tensor([10, 10])
    guided = Guided(network, cond, null, 3.0, channels=3, interval=(0.2, 0.8))
    x = torch.zeros(2, 4, 1, 1)
    inside = guided(x, Level(0.5, 0.5, 500.0, 0.5))
    assert inside[:, :3].flatten(1).tolist() == [[-17.0] * 3, [-14.0] * 3]  # u + 3·(c - u)
    assert inside[:, 3].flatten().tolist() == [1.0, 2.0]
    outside = guided(x, Level(0.1, 0.9, 900.0, 0.9))
    assert outside.flatten(1).tolist() == [[1.0] * 4, [2.0] * 4]
    assert batches == [4, 2]
    assert (guided.evaluations, guided.guided_rows) == (2, 2)


def test_scale_one_computes_no_null_rows() -> None:
    guided = Guided(lambda x, t, y: x, torch.tensor([1]), torch.tensor([2]), 1.0, 3)
    guided(torch.zeros(1, 3, 1, 1), Level(0.5, 0.5, 0.5, 0.5))
    assert (guided.evaluations, guided.guided_rows) == (1, 0)


@pytest.mark.parametrize("name", ["rk45", "", "DDPM"])
def test_other_solvers_are_refused_by_name(name: str) -> None:
    with pytest.raises(RequestError, match=f"solver: expected one of .*dpm.*, got '{name}'"):
        find_solver(name)


@pytest.mark.parametrize(
    ("name", "eta", "said"), [("heun", 0.5, "only solver 'ddim' takes it, got 'heun'"), ("ddim", 1.5, "0 to 1")]
)
def test_eta_is_of_ddim_alone(name: str, eta: float, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        find_solver(name, eta)
