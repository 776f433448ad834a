"""Raw and scaled latents by hand."""

import math

import torch

from ldit.codecs.latents import draw, scaled, unscaled
from ldit.config.spec import AutoencoderConfig


def test_numbers() -> None:
    config = AutoencoderConfig(scale=0.5, shift=1.0)
    raw = torch.tensor([3.0, -1.0]).view(1, 2, 1, 1)
    assert scaled(raw, config).flatten().tolist() == [1.0, -1.0]  # (3 - 1)·½, (-1 - 1)·½
    assert unscaled(scaled(raw, config), config).flatten().tolist() == [3.0, -1.0]


def test_one_a_channel() -> None:
    config = AutoencoderConfig(scale=(0.5, 2.0), shift=(1.0, -4.0))
    raw = torch.tensor([[3.0, 5.0], [-1.0, 0.0]]).view(1, 2, 1, 2)  # channels, then places
    expected = torch.tensor([[1.0, 2.0], [6.0, 8.0]]).view(1, 2, 1, 2)
    assert torch.equal(scaled(raw, config), expected)
    assert torch.equal(unscaled(expected, config), raw)


def test_draw_clamps_the_log_variance() -> None:
    mean, noise = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([2.0, 1.0, 1.0])
    drawn = draw(mean, torch.tensor([2 * math.log(3.0), 1000.0, -1000.0]), noise)
    torch.testing.assert_close(drawn, torch.tensor([7.0, math.exp(10.0), math.exp(-15.0)]), rtol=1e-6, atol=0)
