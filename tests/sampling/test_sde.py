"""SiT's stochastic sampler: its formulas in its own coordinates, and where every diffusion coefficient leads."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ldit.config.presets import original_dit
from ldit.config.requests.sampling import SamplingRequest
from ldit.config.spec import SIT, AutoencoderConfig, ModelSpec, SamplingConfig
from ldit.diffusion import DDPM, Flow
from ldit.diffusion.process import Denoised, Level, Process
from ldit.errors import RequestError
from ldit.pipeline.request import check_request
from ldit.sampling.grids import build_grid
from ldit.sampling.sde import DIFFUSIONS, LAST_STEPS, parse_last_step
from ldit.sampling.solvers import OWN_SETTINGS, find_solver

SIT_FLOW = Flow(time_scale=1.0, data_at=1)


def velocity(x: Tensor, t: float) -> Tensor:
    """Anything smooth, in SiT's time: noise at 0, data at 1."""
    return torch.sin(1.3 * x + t) - 0.4 * x


# SiT's diffusion coefficients over its own time, without the factor.
SIT_FORMS: dict[str, Callable[[float], float]] = {
    "constant": lambda t: 1.0,
    "sigma": lambda t: 1.0 - t,
    "linear": lambda t: 1.0 - t,
    "sbdm": lambda t: (1.0 - t) / t,
    "decreasing": lambda t: 0.25 * (math.cos(math.pi * t) + 1.0) ** 2,
    "increasing-decreasing": lambda t: math.sin(math.pi * t) ** 2,
}


def sit(x: Tensor, evaluations: int, form: str, last: str, size: float, noise: Callable[[int], Tensor]) -> Tensor:
    """SiT's sampler in its own coordinates: x_t = t·x0 + (1-t)·eps, drift v + D·score, noise sqrt(2 D dt)."""
    d = SIT_FORMS[form]
    end = 1.0 - size
    dt = end / (evaluations - 1)

    def drift(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        v = velocity(x, t)
        sigma = 1.0 - t
        return v, -(x - t * v) / sigma  # eps = x - t·v on the straight path

    for i in range(evaluations - 1):
        t = i * dt
        v, score = drift(x, t)
        strength = d(t) if t or form != "sbdm" else d(dt)  # infinite at the start
        x = x + (v + strength * score) * dt + math.sqrt(2 * strength * dt) * noise(i)
    v, score = drift(x, end)
    if last == "mean":
        return x + (v + d(end) * score) * size
    if last == "euler":
        return x + v * size
    return x / end + size**2 / end * score  # Tweedie


def estimate(x: Tensor, level: Level) -> Denoised:
    return SIT_FLOW.denoised(velocity(x, level.time), x, level)


@pytest.mark.parametrize("form", DIFFUSIONS)
@pytest.mark.parametrize("last", ["mean", "tweedie", "euler"])
def test_as_its_formulas(form: str, last: str) -> None:
    """50 evaluations in fp32 with the same noise; the errors of 50 steps of rounding at values of about 1."""
    random = torch.Generator().manual_seed(0)
    x, noises = torch.randn(1, 3, 8, 8, generator=random), torch.randn(50, 1, 3, 8, 8, generator=random)
    expected = sit(x, 50, form, last, 0.04, lambda i: noises[i])
    levels = build_grid(SIT_FLOW, "50", last=0.04)
    solver = find_solver("euler-maruyama", diffusion=form, last_step=f"{last}:0.04")
    *_, step = solver(estimate, x, levels, lambda i: noises[i])
    scale = float(expected.abs().max())
    assert (step.x - expected).abs().max() <= 1e-5 * max(scale, 1.0)


def test_the_defaults_of_a_sit_file() -> None:
    assert SIT.published_sampling(4) == SamplingConfig(
        "euler-maruyama", 250, 4.0, 3, diffusion="sigma", last_step="mean:0.04"
    )
    levels = build_grid(SIT_FLOW, "250", last=0.04)
    times = [level.time for level in levels[:-1]]  # 250 evaluations: linspace(0, 0.96, 250)
    assert times == pytest.approx([0.96 * i / 249 for i in range(250)], abs=1e-12)


def test_a_listed_grid_has_its_own_last_step() -> None:
    """Of a SiT file's default, mean:0.04, the mean is left; a length that is asked for is refused."""
    spec = ModelSpec(
        original_dit("S", input_size=8, patch_size=2, in_channels=4, num_classes=2), SIT, AutoencoderConfig()
    )
    request = check_request(spec, SamplingRequest(class_labels=[1], grid="1,0.5,0.1"))
    assert request.settings.last_step == "mean" and [level.noise_time for level in request.levels] == [1, 0.5, 0.1, 0]
    assert check_request(spec, SamplingRequest(class_labels=[1])).settings.last_step == "mean:0.04"
    with pytest.raises(RequestError, match="last_step: a length needs"):
        check_request(spec, SamplingRequest(class_labels=[1], grid="1,0.5,0.1", last_step="mean:0.1"))


@pytest.mark.parametrize("process", [Flow(), DDPM()], ids=["flow", "ddpm"])
@pytest.mark.parametrize("last", LAST_STEPS)
@pytest.mark.parametrize("form", [*DIFFUSIONS, "sigma:0.5"])
def test_every_coefficient_reaches_mean_and_deviation(form: str, last: str, process: Process) -> None:
    """Of a Gaussian, whatever noise is added on the way: 400 steps, finer towards the data."""
    mean, std, count = 0.5, 0.3, 20_000

    def gaussian(x: Tensor, level: Level) -> Denoised:
        gain = level.alpha * std**2 / (level.alpha**2 * std**2 + level.sigma**2)
        x0 = mean + gain * (x - level.alpha * mean)
        return Denoised(x0, (x - level.alpha * x0) / level.sigma)

    random = torch.Generator().manual_seed(1)

    def normal(i: int = 0) -> Tensor:
        return torch.randn(count, dtype=torch.float64, generator=random)

    grid = build_grid(process, "400", "shifted:0.5")
    *_, step = find_solver("euler-maruyama", diffusion=form, last_step=last)(gaussian, normal(), grid, normal)
    # Sampling errors of 4 deviations, and a bias of first order in the steps.
    assert step.x.mean().item() == pytest.approx(mean, abs=4 * std / math.sqrt(count) + 0.01)
    # The mean step leaves out noise of variance 2 D h: with D = 1 that is seen even at h = 0.01.
    missing = 2 * grid[-2].r if (form, last) == ("constant", "mean") else 0.0
    expected = math.sqrt(std**2 - missing)
    assert step.x.std().item() == pytest.approx(expected, rel=4 / math.sqrt(2 * count) + 0.03)


def test_defaults_are_those_of_the_configuration() -> None:
    assert {name: default for name, (_, default) in OWN_SETTINGS.items()} == {
        name: getattr(SamplingConfig(), name) for name in OWN_SETTINGS
    }


def test_bad_settings_are_named() -> None:
    bad = (("diffusion", "sgima"), ("diffusion", "sigma:x"), ("last_step", "median"), ("last_step", "mean:2"))
    for setting, value in bad:
        with pytest.raises(RequestError, match=f"{setting}: expected one of .*{value}"):
            find_solver("euler-maruyama", **{setting: value})  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="diffusion constant: only solver 'euler-maruyama' takes it, got 'heun'"):
        find_solver("heun", diffusion="constant")
    with pytest.raises(RequestError, match="last_step: a length needs a number of steps from 2"):
        build_grid(SIT_FLOW, "1", last=0.04)
    assert parse_last_step("Mean:0.04") == ("mean", 0.04) and parse_last_step("none") == ("none", None)
