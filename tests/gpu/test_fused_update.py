"""The fused update's kernel against the passes that it replaces; `TRITON_INTERPRET=1` runs it without a GPU."""

import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldit.config.sections import EMAConfig, OptimConfig
from ldit.parallel.exchange import ModelGroup
from ldit.parallel.layout import Layout
from ldit.training.ema import Averages
from ldit.training.optim import Optimizer
from ldit.training.update import Update
from ldit.training.weights import Weights

pytest.importorskip("triton")
from ldit.training.fused_update import FusedUpdate

pytestmark = pytest.mark.gpu
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


class Net(nn.Module):
    """A matrix that Muon takes, one of whole blocks, and parameters of odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"attention": nn.Module()})])
        self.layers[0]["attention"].wq = nn.Linear(512, 33)
        self.table = nn.Parameter(torch.empty(9, 256))
        self.odd = nn.Parameter(torch.empty(5, 300))


def built(kind: Any, moments: Any, compute: torch.dtype, host: bool) -> tuple[Weights, Averages, Optimizer]:
    with torch.device("meta"):
        net = Net()
    layouts = {name: Layout(tuple(p.shape)) for name, p in net.named_parameters()}
    weights = Weights(net, layouts, DEVICE, compute)
    drawn = torch.Generator().manual_seed(0)
    weights.fill(lambda name, layout, part: torch.randn(layout.shape, generator=drawn))
    averages = Averages(EMAConfig(0.9, more=(0.5,), host=host), weights.masters)
    averages.start(weights.masters)
    config = OptimConfig(kind=kind, moments=moments, weight_decay=0.1)
    return weights, averages, Optimizer(config, weights, ModelGroup())


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("moments", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16, torch.float16])
def test_one_pass_is_the_passes_one_after_another(kind: str, moments: str, compute: torch.dtype) -> None:
    """Five steps and one that is not sound: to a few roundings of fp32 (products and sums may be fused). Moments in
    fewer bits are equal, or one code apart where the number before rounding differs by fp32's own rounding."""
    states = [built(kind, moments, compute, host=kind == "muon") for _ in range(2)]
    updates = [form(*state) for form, state in zip((Update, FusedUpdate), states, strict=True)]
    applied = 0
    for step in range(6):
        drawn = torch.Generator().manual_seed(step + 1)
        is_sound = step != 3
        grads = [torch.randn(m.shape, generator=drawn).to(DEVICE, compute) for m in states[0][0].masters]
        grads = grads if is_sound else [grad * float("nan") for grad in grads]
        factor = None if step == 1 else torch.tensor(0.37, device=DEVICE)
        for update in updates:
            sound = torch.tensor(is_sound, device=DEVICE)
            update.queue([grad.clone() for grad in grads], 1e-2, sound, step, factor, applied + 1)
            if is_sound:
                update.settle(applied + 1)
        applied += is_sound
    (a, averages_a, optimizer_a), (b, averages_b, optimizer_b) = states
    # The sum of five updates, 0.05 at most, in weights of up to 4, whose rounding is 2.4e-7.
    drawn = torch.Generator().manual_seed(0)
    starts = [torch.randn(m.shape, generator=drawn).to(DEVICE) for m in a.masters]
    moves = [[m.detach() - start for m, start in zip(w.masters, starts, strict=True)] for w in (a, b)]
    close(*moves, {"fp32": 1e-4, "bf16": 2**-7, "int8": 1 / 127}[moments])
    if DEVICE == "cuda":  # the interpreter cuts off where the device rounds to nearest
        assert all(torch.equal(x, m.to(compute)) for x, m in zip(b.copies, b.masters, strict=False))
    for name, track in averages_a.tracks.items():
        close(track.values, averages_b.tracks[name].values, 1e-6 if moments == "fp32" else 1e-4)
    close(a.copies, b.copies, 2 * torch.finfo(compute).eps)
    for (name, _, x), (_, _, y) in zip(optimizer_a.state(), optimizer_b.state(), strict=True):
        close([x], [y], {torch.bfloat16: 2**-7, torch.int8: 1 / 127}.get(x.dtype, 1e-6))
        if x.dtype in (torch.bfloat16, torch.int8):
            assert (x != y).float().mean() < 1e-2, name


def close(found: list[Any], expected: list[Any], off: float) -> None:
    """Differences relative to the largest number of each tensor."""
    for x, y in zip(found, expected, strict=True):
        worst: Tensor = (x.detach().float() - y.detach().float()).abs().max()
        assert worst <= off * y.detach().float().abs().max()
