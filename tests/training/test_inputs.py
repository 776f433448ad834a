"""Latents of a batch: pixels, images encoded now, moments encoded before."""

import numpy as np
import pytest
import torch
from torch import Tensor

from ldit.config.spec import AutoencoderConfig
from ldit.data.batch import Batch
from ldit.rng import normal
from ldit.training.tasks.inputs import CachedInputs, EncodedInputs, PlainInputs

CPU = torch.device("cpu")
CONFIG = AutoencoderConfig("x", scale=(0.5, 2.0), shift=(1.0, -3.0), factor=2)


class Codec:
    """Means are sums over 2x2 pixels of two channels, log-variances a constant a channel."""

    config = CONFIG

    def moments(self, images: Tensor, tf32: bool = False) -> tuple[Tensor, Tensor]:
        mean = torch.nn.functional.avg_pool2d(images[:, :2], 2) * 4
        logvar = torch.tensor([-1.0, 0.5]).view(1, 2, 1, 1).expand_as(mean)
        return mean, logvar


def batch(positions: tuple[int, ...], inputs: Tensor) -> Batch:
    return Batch(inputs, torch.zeros(len(positions), dtype=torch.long), positions)


def test_plain_inputs_are_the_batch() -> None:
    inputs = torch.randn(2, 3, 4, 4)
    assert torch.equal(PlainInputs()(batch((0, 1), inputs), CPU), inputs)


def test_a_latent_is_drawn_by_its_definition() -> None:
    """z = (mean + exp(logvar/2)·noise(seed, "posterior", position) - shift)·scale, number by number in float64."""
    images = torch.randn(3, 3, 4, 4)
    z = EncodedInputs(Codec(), seed=9)(batch((5, 0, 77), images), CPU)
    for row, position in enumerate((5, 0, 77)):
        noise = normal((2, 2, 2), 9, "posterior", 0, position).double().numpy()
        for c, y, x in np.ndindex(2, 2, 2):
            mean = images[row, c, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].double().sum().item()
            raw = mean + np.exp((-1.0, 0.5)[c] / 2) * noise[c, y, x]
            assert z[row, c, y, x].item() == pytest.approx((raw - (1.0, -3.0)[c]) * (0.5, 2.0)[c], rel=1e-5, abs=1e-6)


def test_cached_moments_give_what_encoding_now_gives() -> None:
    images, positions = torch.randn(3, 3, 4, 4), (5, 0, 77)
    online = EncodedInputs(Codec(), seed=9)(batch(positions, images), CPU)
    moments = torch.cat(Codec().moments(images), dim=1)
    assert torch.equal(CachedInputs(CONFIG, seed=9)(batch(positions, moments), CPU), online)


def test_every_visit_draws_anew_and_batches_do_not_matter() -> None:
    moments = torch.cat(Codec().moments(torch.randn(1, 3, 4, 4)), dim=1).expand(4, -1, -1, -1)
    inputs = CachedInputs(CONFIG, seed=1)
    z = inputs(batch((0, 1, 2, 3), moments), CPU)
    assert len({value.item() for value in z[:, 0, 0, 0]}) == 4
    assert torch.equal(inputs(batch((2,), moments[:1]), CPU), z[2:3])
    assert not torch.equal(CachedInputs(CONFIG, seed=2)(batch((0,), moments[:1]), CPU), z[:1])
