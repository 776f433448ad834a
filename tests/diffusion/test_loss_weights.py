"""Weights and further terms of the losses, against their definitions in float64; off, they change no bit."""

from typing import Literal

import pytest
import torch
from torch import Tensor

from ldit.diffusion import DDPM, Flow

SHAPE = (5, 3, 4, 4)


def drawn() -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(1)
    x0, noise, out = (torch.randn(SHAPE, generator=source) for _ in range(3))
    return x0, noise, out


@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_min_snr_of_a_flow(prediction: Literal["v", "x0"]) -> None:
    """The loss is the squared error of the data times min(SNR, gamma), whatever is predicted, at every time."""
    x0, noise, out = drawn()
    t = torch.tensor([0.01, 0.03, 0.31, 0.5, 1.0])
    losses = Flow(prediction, min_snr=5.0).losses(lambda x, time: out, x0, t, noise)
    for i in range(5):
        time = t[i].double()
        snr = ((1 - time) / time) ** 2
        x_t = (1 - time) * x0[i].double() + time * noise[i].double()
        data = out[i].double() if prediction == "x0" else x_t - time * out[i].double()
        error = (data - x0[i].double()).square().mean()
        assert losses["loss"][i].item() == pytest.approx((min(snr.item(), 5.0) * error).item(), rel=1e-4)
    assert torch.equal(losses["mse"], Flow(prediction).losses(lambda x, time: out, x0, t, noise)["mse"])


def test_min_snr_of_ddpm() -> None:
    x0, noise, out = drawn()
    process, t = DDPM(min_snr=5.0), torch.tensor([0, 100, 400, 700, 999])
    losses = process.losses(lambda x, time: out, x0, t, noise)
    signal = torch.from_numpy(process.tables.alphas_cumprod)[t]
    snr = signal / (1 - signal)
    error = (out.double() - noise.double()).square().mean((1, 2, 3))
    torch.testing.assert_close(losses["loss"].double(), error * snr.clamp(max=5.0) / snr, rtol=1e-5, atol=0)
    # The bound of the variance is not weighted.
    both = torch.cat([out, out], 1)
    weighted, plain = (one.losses(lambda x, time: both, x0, t, noise) for one in (process, DDPM()))
    torch.testing.assert_close(weighted["loss"] - plain["loss"], losses["loss"] - plain["mse"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("data_at", [0, 1])
@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_direction(prediction: str, data_at: int) -> None:
    """1 - cos of the two velocities at every place, over channels; 0 for a perfect network, 2 for its opposite."""
    x0, noise, out = drawn()
    t = torch.full((5,), 0.4)
    process = Flow(prediction, 1000.0, data_at, direction=0.5)  # type: ignore[arg-type]
    losses = process.losses(lambda x, time: out, x0, t, noise)
    velocity, true = process.velocity(out, process.q_sample(x0, t, noise), t), noise - x0
    total = 0.0
    for row in range(4):
        for column in range(4):
            a, b = velocity[0, :, row, column].double(), true[0, :, row, column].double()
            total += 1 - (a @ b / (a.norm() * b.norm())).item()
    assert losses["direction"][0].item() == pytest.approx(total / 16, rel=1e-5)
    torch.testing.assert_close(losses["loss"], losses["mse"] + 0.5 * losses["direction"])
    perfect = x0 if prediction == "x0" else (true if data_at == 0 else -true)
    assert process.losses(lambda x, time: perfect, x0, t, noise)["direction"].abs().max() < 1e-5


def test_off_changes_no_bit() -> None:
    x0, noise, out = drawn()
    t, index = torch.rand(5), torch.arange(5) * 200
    a, b = (one.losses(lambda x, time: out, x0, t, noise) for one in (Flow(), Flow(min_snr=0.0, direction=0.0)))
    assert a.keys() == b.keys() == {"loss", "mse"} and torch.equal(a["loss"], b["loss"])
    c, d = (one.losses(lambda x, time: out, x0, index, noise) for one in (DDPM(), DDPM(min_snr=0.0)))
    assert torch.equal(c["loss"], d["loss"]) and torch.equal(c["loss"], c["mse"])
