"""Blocks on the host of a CUDA device: the numbers of the model moved whole, and the memory of two blocks."""

import gc

import pytest
import torch
from torch import nn

from ldit.config.model import ClassModelConfig
from ldit.nn.build import build_model
from ldit.nn.dit import init_weights
from ldit.rng import generator
from ldit.sampling.fast.offload import offload

pytestmark = pytest.mark.gpu
CONFIG = ClassModelConfig(dim=1024, n_layers=10, n_heads=16, num_classes=5, input_size=16, qk_norm=True)


def network(dtype: torch.dtype) -> nn.Module:
    model = build_model(CONFIG, "cpu")
    init_weights(model, lambda name: generator(0, "weights", 0, name))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not p.any():  # what starts at zero would hide the blocks
                p.normal_(0.0, 0.02, generator=generator(0, "zeros", 0, name))
    return model.to(dtype).eval().requires_grad_(False)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_same_numbers_in_the_memory_of_two_blocks(stored: torch.dtype) -> None:
    x = torch.randn(2, 4, 16, 16, device="cuda").bfloat16()
    t, y = torch.tensor([999.0, 3.0], device="cuda"), torch.tensor([0, 5], device="cuda")
    plain = network(stored).to("cuda", torch.bfloat16)
    expected = plain(x, t, y)
    whole = sum(p.nbytes for p in plain.parameters())
    block = sum(p.nbytes for p in plain.layers[0].parameters())  # type: ignore[index, union-attr]
    ends = whole - CONFIG.n_layers * block
    del plain
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = offload(network(stored), "cuda", torch.bfloat16)
    assert all(p.is_pinned() for p in model.layers.parameters())  # type: ignore[union-attr]
    for _ in range(20):  # back to back: copies for the next call race with the end of this one
        assert torch.equal(model(x, t, y), expected)
    assert torch.cuda.max_memory_allocated() - before < 2 * block + ends + (32 << 20)


@torch.no_grad()
def test_what_is_let_go_is_free_again() -> None:
    gc.collect()
    before = torch.cuda.memory_allocated()
    model = offload(network(torch.float32), "cuda", torch.bfloat16)
    model(torch.zeros(1, 4, 16, 16, device="cuda").bfloat16(), torch.zeros(1, device="cuda"),
          torch.zeros(1, device="cuda", dtype=torch.int64))  # fmt: skip
    gc.disable()
    try:
        del model
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() == before
    finally:
        gc.enable()
