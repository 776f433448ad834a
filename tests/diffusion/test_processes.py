"""DDPM and flow matching beyond the golden files."""

import math

import pytest
import torch

from ldit.config.sections import ObjectiveConfig
from ldit.diffusion import DDPM, Flow
from ldit.diffusion.flow import shifted
from ldit.diffusion.schedule import respace

X0, NOISE = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(0)).split(2)


def test_the_bound_moves_only_the_variance() -> None:
    out = torch.randn(2, 6, 4, 4, requires_grad=True)
    t = torch.tensor([0, 500])
    losses = DDPM().losses(lambda x, t: out, X0, t, NOISE)
    (gradient,) = torch.autograd.grad(losses["vb"].sum(), out, retain_graph=True)
    assert not gradient[:, :3].any() and gradient[:, 3:].any()
    (gradient,) = torch.autograd.grad(losses["mse"].sum(), out)
    assert gradient[:, :3].any() and not gradient[:, 3:].any()
    assert torch.equal(losses["loss"], losses["mse"] + losses["vb"])


def test_a_perfect_network_has_no_loss() -> None:
    t = torch.tensor([3, 999])
    exact = DDPM().losses(lambda x, t: NOISE, X0, t, NOISE)
    assert not exact["loss"].any() and not exact["vb"].any()
    low_variance = torch.cat([NOISE, -torch.ones_like(NOISE)], dim=1)  # the true posterior's variance
    learned = DDPM().losses(lambda x, t: low_variance, X0, t, NOISE)
    assert learned["vb"].abs().max() < 1e-5 and not learned["mse"].any()


def test_fixed_large_variance() -> None:
    """[posterior_variance_1, beta_1, …] when the network does not learn it."""
    ddpm = DDPM()
    posterior = ddpm.posterior(torch.zeros(2, 3, 4, 4), X0, torch.tensor([0, 7]))
    expected = [ddpm.tables.posterior_variance[1], ddpm.tables.betas[7]]
    assert posterior.variance[:, 0, 0, 0].tolist() == pytest.approx(expected, rel=1e-6)


def test_the_network_is_given_original_indices() -> None:
    seen = []

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(t.tolist())
        return x

    DDPM.respaced("10").losses(predict, X0, torch.tensor([0, 9]), NOISE)
    assert seen == [[0, 999]]


@pytest.mark.parametrize("sections", ["1001", "0", "-3", "x", "", "ddim300", "ddim", "1,1000", "1.5"])
def test_respacings_that_cannot_be(sections: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 (several messages)
        respace(1000, sections)


def test_respacing_rounds_by_repeated_addition() -> None:
    """21 of 1000 is the first count where repeated addition and multiplication round differently."""
    stride = 999 / 20
    assert list(respace(1000, "21")) != [round(i * stride) for i in range(21)]
    assert all(list(respace(1000, str(n)))[-1] == 999 for n in (2, 10, 50, 250))
    assert respace(1000, "1") == (0,)


def test_wrong_output_width_is_named() -> None:
    with pytest.raises(ValueError, match="5 channels, expected 3 or 6"):
        DDPM().losses(lambda x, t: torch.zeros(2, 5, 4, 4), X0, torch.tensor([1, 2]), NOISE)


@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_flow_is_exact_for_a_perfect_network(prediction: str) -> None:
    t = torch.tensor([0.01, 0.7])
    answer = NOISE - X0 if prediction == "v" else X0
    flow = Flow(prediction=prediction)  # type: ignore[arg-type]
    losses = flow.losses(lambda x, time: answer, X0, t, NOISE)
    assert losses["loss"].abs().max() < 1e-10
    assert torch.equal(flow.q_sample(X0, torch.zeros(2), NOISE), X0)
    assert torch.equal(flow.q_sample(X0, torch.ones(2), NOISE), NOISE)


def test_flow_times_and_directions() -> None:
    """SiT's convention (data at 1, unscaled, target data - noise) is the same objective seen from the other end."""
    t, seen = torch.tensor([0.25, 0.9]), []

    def sit(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        seen.append(time)
        return torch.cat([X0 - NOISE, torch.zeros_like(X0)], dim=1)  # 2C channels, the first C count

    losses = Flow(time_scale=1.0, data_at=1).losses(sit, X0, t, NOISE)
    assert losses["loss"].abs().max() < 1e-10
    assert torch.allclose(seen[0], 1 - t)
    assert torch.allclose(Flow().network_time(t), 1000 * t)


def test_errors_of_eps_agree_between_processes() -> None:
    """The held-out figure of a flow is the error of the noise it implies."""
    t, wrong = torch.tensor([0.2, 0.6]), torch.randn(2, 3, 4, 4)
    flow = Flow()
    x_t = flow.q_sample(X0, t, NOISE)
    error = flow.heldout_error(flow.losses(lambda x, time: wrong, X0, t, NOISE), t)
    eps = x_t + (1 - t.view(-1, 1, 1, 1)) * wrong
    assert torch.allclose(error, (eps - NOISE).square().flatten(1).mean(1), rtol=1e-5)


def test_times() -> None:
    """Indices cover 0 to 999; flow's times are sigmoid(mean + std·normal), then shifted."""
    assert DDPM().times_at(torch.tensor([0.0, 0.5, 0.9999999])).tolist() == [0, 500, 999]
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    drawn = DDPM().draw_times(generators, ObjectiveConfig())
    expected = [int(torch.rand((), generator=torch.Generator().manual_seed(seed)) * 1000) for seed in range(3)]
    assert drawn.tolist() == expected
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    normals = [torch.randn((1,), generator=torch.Generator().manual_seed(seed)).item() for seed in range(3)]
    flat = [1 / (1 + math.exp(-(0.8 + 0.5 * z))) for z in normals]
    t = Flow(shift=3.0).draw_times(generators, ObjectiveConfig(time_mean=0.8, time_std=0.5))
    assert t.tolist() == pytest.approx([3 * u / (1 + 2 * u) for u in flat], rel=1e-6)
    assert shifted(0.5, 3.0) == pytest.approx(0.75) and shifted(0.3, 1.0) == pytest.approx(0.3) and shifted(1, 7) == 1
