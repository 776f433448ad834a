"""int8 matrices of the inference copy: how far off they are, and what they go with."""

import pytest
import torch
from sampling.inference import batch, error, prepared, tiny
from torch import nn

from ldit.config.model import OriginalDiTConfig
from ldit.errors import RequestError
from ldit.nn.build import build_model
from ldit.sampling.fast.options import InferenceOptions
from ldit.sampling.fast.prepare import prepare
from ldit.sampling.fast.quantised import Int8Linear

pytestmark = pytest.mark.usefixtures("one_thread")  # bits are compared


def test_int8_with_every_switch() -> None:
    """Off by no more than without them."""
    wide = {"dim": 64, "multiple_of": 64, "n_layers": 3}
    switches = {"shared_adaln": True, "class_tokens": 2, "value_residual": True, "fine_layers": 1}
    offs = []
    for changes in ({}, switches):
        model = tiny(**wide, **changes)
        x, t, y = batch(model)
        offs.append(error(prepared(model, int8=True)(x, t, y), model(x, t, y)))
    assert 0 < offs[1] < max(2 * offs[0], 0.1)


def test_int8_error() -> None:
    """Weights and activations carry 7 bits and a sign: each product is off by about 1/127/sqrt(3) of a typical value
    and its inputs by as much, so about 1 % of a product's norm; two blocks of two residual branches add up to few."""
    model = tiny(dim=64, multiple_of=64, qk_norm=True)
    x, t, y = batch(model)
    found, expected = prepared(model, int8=True)(x, t, y), model(x, t, y)
    off = ((found - expected).norm() / expected.norm()).item()
    assert 1e-4 < off <= 0.03


def test_a_token_does_not_depend_on_the_range_of_its_neighbours() -> None:
    """A lone positive token spans half the range that it spans beside a negative one."""
    product = Int8Linear(nn.Linear(16, 8, bias=False))
    token = torch.rand(1, 16)
    assert torch.equal(product(token)[0], product(torch.cat([token, -token]))[0])


def test_int8_is_for_fp32_on_the_cpu() -> None:
    for dtype in (torch.bfloat16, torch.float64):
        with pytest.raises(RequestError, match=f"int8: needs an fp32 network on the CPU, got {dtype} on cpu"):
            prepare(tiny().to(dtype), InferenceOptions(int8=True))
    with pytest.raises(RequestError, match="int8: its products cannot be compiled"):
        prepare(tiny(), InferenceOptions(int8=True, compiled=True))
    other = build_model(OriginalDiTConfig(input_size=8, hidden_size=32, depth=1, num_heads=4))
    for inference in (
        InferenceOptions(int8=True),
        InferenceOptions(graph=True),
        InferenceOptions(host_modulation=True),
    ):
        with pytest.raises(RequestError, match=r"[a-z8_]+: only class-conditional Large-DiT"):
            prepare(other, inference)
