"""SiT's paths and predictions, by its formulas in its own time s = 1 - t: noise at 0, data at 1."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from ldit.config.recipes.registry import diffusion_recipe
from ldit.config.run import RunConfig
from ldit.config.sections import ObjectiveConfig, StageConfig
from ldit.config.serial import to_dict
from ldit.config.spec import FlowConfig, without_defaults_added
from ldit.diffusion import Flow
from ldit.diffusion.build import build_process
from ldit.diffusion.process import Denoised, Level
from ldit.errors import ConfigError, RequestError
from ldit.sampling.grids import build_grid
from ldit.sampling.solvers import ADAPTIVE, SOLVERS, find_solver

PATHS = ("linear", "gvp", "vp")
PREDICTIONS = ("v", "eps", "score")
SHAPE = (6, 2, 3, 3)
X0, NOISE, OUT = (torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2, 3))
T = torch.tensor([0.02, 0.3, 0.5, 0.77, 0.95, 0.998])


def flow(path: str, prediction: str = "v", weight: str = "none", data_at: int = 1) -> Flow:
    settings: dict[str, Any] = {"path": path, "prediction": prediction}
    return Flow(time_scale=1.0, data_at=data_at, loss_weight=weight, **settings)  # type: ignore[arg-type]


def coefficients(path: str, s: float) -> tuple[float, float]:
    """SiT's alpha and sigma."""
    if path == "linear":
        return s, 1.0 - s
    if path == "gvp":
        return math.sin(s * math.pi / 2), math.cos(s * math.pi / 2)
    log_mean = -0.25 * (1 - s) ** 2 * (20.0 - 0.1) - 0.5 * (1 - s) * 0.1
    return math.exp(log_mean), math.sqrt(1 - math.exp(2 * log_mean))


def rates(path: str, s: float) -> tuple[float, float]:
    """Their derivatives, by differences."""
    h = 1e-6
    above, below = coefficients(path, s + h), coefficients(path, s - h)
    return (above[0] - below[0]) / (2 * h), (above[1] - below[1]) / (2 * h)


def targets(path: str, prediction: str) -> tuple[Tensor, Tensor]:
    """x at SiT's times 1 - T, and what a perfect network answers there."""
    xs, answers = [], []
    for x0, noise, t in zip(X0.double(), NOISE.double(), T.tolist(), strict=True):
        (alpha, sigma), (alpha_rate, sigma_rate) = coefficients(path, 1 - t), rates(path, 1 - t)
        xs.append(alpha * x0 + sigma * noise)
        answers.append({"v": alpha_rate * x0 + sigma_rate * noise, "eps": noise, "score": -noise / sigma}[prediction])
    return torch.stack(xs), torch.stack(answers)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
def test_what_is_trained(path: str, prediction: str) -> None:
    """The network sees SiT's x and time; its answer has no error if it is SiT's target, and data and noise follow."""
    process, (x, answer), seen = flow(path, prediction), targets(path, prediction), []

    def network(x_t: Tensor, time: Tensor) -> Tensor:
        seen.append((x_t, time))
        return torch.cat([answer.float(), torch.zeros(SHAPE)], 1)  # 2C channels, the first C count

    losses = process.losses(network, X0, T, NOISE)
    torch.testing.assert_close(seen[0][0].double(), x, rtol=0, atol=2e-6)
    torch.testing.assert_close(seen[0][1], 1 - T)
    assert losses["loss"].max() < 1e-9 and process.heldout_error(losses, T).max() < 1e-9
    for i, t in enumerate(T.tolist()):
        level = process.level(t)
        assert (level.alpha, level.sigma) == pytest.approx(coefficients(path, 1 - t), rel=1e-6, abs=1e-9)
        found = process.denoised(answer[i : i + 1], x[i : i + 1], level)
        torch.testing.assert_close(found.eps[0], NOISE[i].double(), rtol=0, atol=1e-5)
        torch.testing.assert_close(found.x0[0], X0[i].double(), rtol=0, atol=2e-3 if t > 0.99 else 1e-5)


@pytest.mark.parametrize("weight", ["none", "velocity", "likelihood"])
@pytest.mark.parametrize("prediction", ["eps", "score"])
@pytest.mark.parametrize("path", PATHS)
def test_weights(path: str, prediction: str, weight: str) -> None:
    """SiT's: of the squared error of the noise, by the drift of the path."""
    losses = flow(path, prediction, weight).losses(lambda x, time: OUT, X0, T, NOISE)
    for i, t in enumerate(T.tolist()):
        (alpha, sigma), (alpha_rate, sigma_rate) = coefficients(path, 1 - t), rates(path, 1 - t)
        drift = alpha_rate / alpha * sigma**2 - sigma * sigma_rate
        factor = {"none": 1.0, "velocity": (drift / sigma) ** 2, "likelihood": drift / sigma**2}[weight]
        out, noise = OUT[i].double(), NOISE[i].double()
        error = out - noise if prediction == "eps" else out * sigma + noise
        assert losses["loss"][i].item() == pytest.approx(factor * error.square().mean().item(), rel=1e-3)
        assert losses["mse"][i].item() == pytest.approx(error.square().mean().item(), rel=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
def test_errors_of_eps(path: str, prediction: str) -> None:
    """The held-out figure is the error of the noise that a prediction implies."""
    process = flow(path, prediction)
    error = process.heldout_error(process.losses(lambda x, time: OUT, X0, T, NOISE), T)
    for i, t in enumerate(T[:5].tolist()):
        x = process.q_sample(X0[i : i + 1], T[i : i + 1], NOISE[i : i + 1])
        eps = process.denoised(OUT[i : i + 1], x, process.level(t)).eps
        assert error[i].item() == pytest.approx((eps - NOISE[i]).square().mean().item(), rel=1e-4)


@pytest.mark.parametrize(
    ("path", "prediction", "least", "most"),
    [
        ("linear", "v", 0.0, 1.0),
        ("gvp", "v", 0.0, 1.0),
        ("linear", "eps", 1e-3, 0.999),
        ("gvp", "score", 1e-3, 0.999),
        ("vp", "v", 1e-5, 1.0),
        ("vp", "eps", 1e-5, 1.0),
    ],
)
def test_times(path: str, prediction: str, least: float, most: float) -> None:
    """SiT's train_eps: uniform between its ends, which the logit-normal's tails and held-out times keep to also."""
    process = flow(path, prediction)
    generators = [torch.Generator().manual_seed(seed) for seed in range(400)]
    u = torch.cat([torch.rand(1, generator=torch.Generator().manual_seed(seed)) for seed in range(400)])
    drawn = process.draw_times(generators, ObjectiveConfig(times="uniform"))
    torch.testing.assert_close(drawn, least + (most - least) * u)
    tails = process.draw_times(generators, ObjectiveConfig(time_std=50.0))
    assert (tails.min().item(), tails.max().item()) == pytest.approx((least, most), abs=1e-7)
    assert process.times_at(torch.tensor([0.0])).item() == pytest.approx(least)
    times = [level.noise_time for level in process.own_grid("4")]
    assert process.level(1.0).noise_time == times[0] == most
    assert times == pytest.approx([most, 0.75 * most, most / 2, most / 4, 0])


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("solver", ["ab4", "dpm++3m", "unipc2", "ddpm"])
def test_as_many_steps_as_one_likes(solver: str, shift: float) -> None:
    """Steps shorter than what predictions of the noise leave out at the noisy end; nor do shifted times go there."""
    process = Flow("eps", shift=shift)
    for levels in (process.own_grid("2000"), build_grid(process, "1500", "shifted:3")):
        assert all(a.noise_time > b.noise_time for a, b in pairwise(levels))
        solve, start = find_solver(solver), torch.ones(1, 1, 2, 2)
        *_, step = solve(lambda x, level: process.denoised(x, x, level), start, levels, torch.zeros_like(start).mul)
        assert step.x.isfinite().all()
    generators = [torch.Generator().manual_seed(seed) for seed in range(200)]
    drawn = process.draw_times(generators, ObjectiveConfig(times="uniform", time_std=1.0))
    assert drawn.min() >= 1e-3 and drawn.max() <= 0.999
    with pytest.raises(RequestError, match=r"must fall from step to step, from at most 0\.999"):
        build_grid(process, "4", "1,0.9995,0.5")


@pytest.mark.parametrize("path", PATHS)
def test_levels_by_their_ratio(path: str) -> None:
    process = flow(path, data_at=0)
    for ratio in (1e-4, 0.02, 0.9, 1.1, 7.0, 140.0):
        level = process.level_of_ratio(ratio)
        assert level.sigma / level.alpha == pytest.approx(ratio, rel=1e-9) and level.time == level.noise_time
    last = process.level_of_ratio(math.inf)
    assert last.noise_time == 1.0 and (last.alpha < 0.007 if path == "vp" else last.alpha == 0.0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("grid", ["uniform", "karras", "cosine"])
def test_a_gaussian_is_reached(path: str, prediction: str, grid: str) -> None:
    """Data N(0.7, 0.3²): from noise alone, with the network that knows them, asked through its prediction, every solver
    gives their mean and deviation; the stochastic ones within the error of 4,000 values."""
    process = flow(path, prediction)
    mean, deviation = 0.7, 0.3

    def denoise(x: Tensor, level: Level) -> Denoised:
        alpha, sigma = level.alpha, level.sigma
        x0 = mean + alpha * deviation**2 / (alpha**2 * deviation**2 + sigma**2) * (x - alpha * mean)
        eps = (x - alpha * x0) / sigma
        alpha_rate, sigma_rate = rates(path, min(max(1.0 - level.noise_time, 0.0), 1 - 2e-6))
        out = {"v": alpha_rate * x0 + sigma_rate * eps, "eps": eps, "score": -eps / sigma}[prediction]
        return process.denoised(out, x, level)

    noise = torch.randn(1, 1, 1, 4000, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    noise = (noise - noise.mean()) / noise.std()
    levels = build_grid(process, "60", grid)
    drawn = torch.randn(60, *noise.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    for solver in (*SOLVERS, ADAPTIVE):
        *_, step = find_solver(solver, process=process)(denoise, noise, levels, lambda i: drawn[i])
        assert step.x.mean().item() == pytest.approx(mean, abs=0.03), solver
        assert step.x.std().item() == pytest.approx(deviation, abs=0.03), solver


def test_the_default_is_the_straight_line_to_the_bit() -> None:
    process, t = Flow(), T.view(-1, 1, 1, 1)
    assert torch.equal(process.q_sample(X0, T, NOISE), (1.0 - t) * X0 + t * NOISE)
    losses = process.losses(lambda x, time: OUT, X0, T, NOISE)
    assert torch.equal(losses["loss"], (OUT - (NOISE - X0)).square().flatten(1).mean(1))
    level = process.level(0.3)
    assert (level.alpha, level.sigma, level.time) == (0.7, 0.3, 300.0)


@pytest.mark.parametrize(
    "settings",
    [
        {"path": "gvp", "prediction": "x0"},
        {"path": "vp", "shift": 2.0},
        {"path": "bezier"},
        {"prediction": "eps", "min_snr": 5.0},
        {"path": "gvp", "direction": 1.0},
        {"loss_weight": "velocity"},
        {"prediction": "eps", "loss_weight": "heavy"},
    ],
)
def test_a_flow_that_is_none(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"linear path|expected|is for predictions"):
        Flow(**settings)
    with pytest.raises(ValueError, match="the network predicts eps"):
        Flow("eps").velocity(X0, X0, T)


def test_defaults_of_sits_family() -> None:
    """SiT's SDE on the straight line, whatever is predicted; its ODE on the others."""
    sit = {"time_scale": 1.0, "data_at": 1}
    for prediction in PREDICTIONS:
        straight = FlowConfig(prediction=prediction, **sit).published_sampling(4)  # type: ignore[arg-type]
        assert (straight.solver, straight.steps, straight.guidance_channels) == ("euler-maruyama", 250, 3)
        curved = FlowConfig(prediction=prediction, path="vp", **sit).published_sampling(4)  # type: ignore[arg-type]
        assert (curved.solver, curved.guidance, curved.guidance_channels) == ("dopri5", 4.0, 3)
    assert FlowConfig(prediction="x0", **sit).published_sampling(4).solver == "heun"  # type: ignore[arg-type]
    # Records of sets are those of before, where the path is.
    assert "path" not in without_defaults_added(to_dict(FlowConfig()))
    assert without_defaults_added(to_dict(FlowConfig(path="vp")))["path"] == "vp"


def config(objective: dict[str, Any] | None = None, stages: int = 0, **process: Any) -> RunConfig:
    recipe = diffusion_recipe("tiny-cpu")
    config = replace(recipe, data=replace(recipe.data, path="x"), process=FlowConfig(**process))
    config = replace(config, objective=ObjectiveConfig(**(objective or {})))
    return replace(config, stages=(StageConfig(recipe.data.image_size // 2, 1, 0.5),) * stages)


def test_a_run_builds_them() -> None:
    one = config({"loss_weight": "velocity"}, path="vp", prediction="score", data_at=1, time_scale=1.0)
    one.check()
    assert build_process(one.process, one.objective) == flow("vp", "score", "velocity")
    assert (
        isinstance(one.process, FlowConfig)
        and one.process.convention == "flow of score on the vp path (time_scale 1, data_at 1)"
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"path": "vp", "shift": 2.0}, r"process\.shift: 2\.0 is for the linear path, not vp"),
        ({"path": "gvp", "prediction": "x0"}, r"process\.prediction: x0 is for the linear path, not gvp"),
        ({"objective": {"loss_weight": "velocity"}}, r"objective\.loss_weight: is for predictions of eps and score"),
        ({"objective": {"min_snr": 5.0}, "prediction": "eps"}, r"objective\.min_snr: is for velocity or data on the"),
        ({"objective": {"direction": 1.0}, "path": "gvp"}, r"objective\.direction: is for velocity or data on the"),
        ({"stages": 1, "path": "gvp"}, "stages: shift is for the linear path"),
    ],
)
def test_what_does_not_go_together(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config(**settings).check()


def test_the_sampler_is_told_which_convention() -> None:
    """Models of two paths or predictions do not guide each other."""
    conventions = {FlowConfig(path=p, prediction=q).convention for p in PATHS for q in PREDICTIONS}  # type: ignore[arg-type]
    assert len(conventions) == 9
