"""One optimiser step: micro-batches, gradient clipping, AdamW, EMA, under one precision policy."""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ldit.config.run import RunConfig
from ldit.data.batch import Batch
from ldit.dtypes import DTYPES
from ldit.train.ema import EMA
from ldit.train.optim import build_optimizer, learning_rate
from ldit.train.task import Task


class TrainState:
    """Master weights (fp32), their compute copy, optimiser, EMA and the number of steps done."""

    def __init__(self, model: nn.Module, config: RunConfig) -> None:
        self.config = config
        self.master = model
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(config.optim, self.parameters, config.train.lr)
        self.ema = EMA(self.parameters, config.ema.decay)
        self.step = 0
        dtype = DTYPES[config.train.precision]
        self.compute = model if dtype == torch.float32 else copy.deepcopy(model).to(dtype)
        self._compute_parameters: list[Tensor] = [p for p in self.compute.parameters() if p.requires_grad]

    @torch.no_grad()
    def sync_compute(self) -> None:
        """Refresh the compute copy from the master weights."""
        if self.compute is not self.master:
            torch._foreach_copy_(self._compute_parameters, self.parameters)

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Move the compute copy's gradients into the master's fp32 ones."""
        if self.compute is self.master:
            return
        for master, compute in zip(self.parameters, self._compute_parameters, strict=True):
            if compute.grad is not None:
                master.grad = compute.grad.float() if master.grad is None else master.grad.add_(compute.grad)
        for p in self._compute_parameters:
            p.grad = None

    @torch.no_grad()
    def ema_model(self) -> nn.Module:
        """A copy of the network with the EMA weights, for sampling and held-out loss."""
        model = copy.deepcopy(self.master)
        targets: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        torch._foreach_copy_(targets, self.ema.average)
        return model.eval().requires_grad_(False)

    def ema_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every entry of the state dict with EMA weights where they are averaged."""
        averaged = dict(zip(self.names, self.ema.average, strict=True))
        for name, value in self.master.state_dict().items():
            yield name, averaged.get(name, value)


def train_step(state: TrainState, task: Task, batch: Batch) -> dict[str, float]:
    """Advance by one step over the global batch; returns the mean of each loss, gradient norm and learning rate.

    Raises FloatingPointError, nothing applied, when the loss or the gradient is not finite.
    """
    config = state.config.train
    sums: dict[str, Tensor] = {}
    for micro in batch.micro(config.micro_batch_size or len(batch)):
        losses = task.losses(state.compute, micro)
        (losses["loss"].sum() / len(batch)).backward()
        state.collect_gradients()
        for name, values in losses.items():
            total = values.detach().sum()
            sums[name] = sums[name] + total if name in sums else total
    norm = torch.nn.utils.get_total_norm([p.grad for p in state.parameters if p.grad is not None])
    if not torch.isfinite(norm):
        state.optimizer.zero_grad()
        raise FloatingPointError(f"gradient norm is {norm.item()} at step {state.step + 1}; no step was applied")
    if config.grad_clip > 0:
        torch.nn.utils.clip_grads_with_norm_(state.parameters, config.grad_clip, norm)
    lr = learning_rate(config, state.step + 1)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.ema.update(state.parameters, state.step)
    state.sync_compute()
    state.step += 1
    means = {name: (total / len(batch)).item() for name, total in sums.items()}
    return {**means, "grad_norm": norm.item(), "lr": lr}
