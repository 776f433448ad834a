"""Tasks that go wrong at chosen samples: loss, input image, one micro-batch, one element of a gradient."""

import random
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ldit.config.run import RunConfig
from ldit.config.spec import ModelSpec
from ldit.data.batch import Batch
from ldit.training.tasks.diffusion import DiffusionTask

KINDS = ("loss", "gradient", "picture", "micro-batch")


@dataclass(frozen=True)
class Fault:
    """What goes wrong with the sample at `position` of the stream, and with it the step that takes it."""

    kind: str
    value: float
    position: int
    seed: int = 0


class Faulty(DiffusionTask):
    """Diffusion whose samples at the faults' positions bring a NaN or an infinity."""

    def __init__(self, config: RunConfig, spec: ModelSpec, *faults: Fault) -> None:
        super().__init__(config, spec)
        self.faults = faults

    def losses(self, model: nn.Module, batch: Batch, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        here = [fault for fault in self.faults if fault.position in batch.positions]
        for fault in here:
            batch = _damaged(batch, fault)
        found = super().losses(model, batch, device, dtype)
        for fault in here:
            row = batch.positions.index(fault.position)
            if fault.kind == "loss":
                found = {**found, "loss": _with(found["loss"], row, fault.value)}
            elif fault.kind == "micro-batch":
                found = {**found, "loss": found["loss"] * fault.value}
            elif fault.kind == "gradient":
                found = {**found, "loss": found["loss"] + _poison(model, fault)}
        return found


def _damaged(batch: Batch, fault: Fault) -> Batch:
    if fault.kind != "picture":
        return batch
    images = batch.inputs.clone()
    place = random.Random(fault.seed).randrange(images[0].numel())
    images[batch.positions.index(fault.position)].view(-1)[place] = fault.value
    return replace(batch, inputs=images)


def _with(values: Tensor, row: int, value: float) -> Tensor:
    """`values` with a number in one row, which has no gradient then."""
    chosen = torch.arange(len(values)) == row
    return torch.where(chosen, value, values)


def _poison(model: nn.Module, fault: Fault) -> Tensor:
    """Zero, whose gradient is not finite in one element of one parameter."""
    drawn = random.Random(fault.seed)
    parameters = list(model.parameters())
    own = parameters[drawn.randrange(len(parameters))]
    place = drawn.randrange(own.numel())
    return _Poison.apply(own, place, fault.value)


class _Poison(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, place: int, value: float) -> Tensor:
        ctx.save_for_backward(own)
        ctx.place, ctx.value = place, value
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (own,) = ctx.saved_tensors
        grad = torch.zeros_like(own)
        grad.view(-1)[ctx.place] = ctx.value
        return grad, None, None
