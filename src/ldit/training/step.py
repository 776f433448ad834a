"""One optimiser step over a global batch: micro-batches, gradient norm, verdict, optimiser, averages.

The host waits for the device once a step, for a few numbers that are copied before the optimiser starts. The device
itself decides whether the step is applied.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from ldit.config.run import BaseRun
from ldit.data.batch import Batch
from ldit.parallel.layout import view
from ldit.parallel.plan import parallelise, sync_gradients
from ldit.parallel.world import World
from ldit.precision import COMPUTE, DTYPES
from ldit.training.optim import learning_rate
from ldit.training.state import TrainState
from ldit.training.tasks.inputs import to_device
from ldit.training.tasks.task import Task
from ldit.training.weights import Weights

TIME_BUCKETS = 4
_LOSS, _COUNT = ([f"{name}_q{q + 1}" for q in range(TIME_BUCKETS)] for name in ("loss", "count"))
RESERVED = frozenset(
    {
        *("count", "time", "lr", "grad_norm", "step", "best", "left_out", "memory", "images_per_second", "data_wait"),
        *("mfu", "loss_scale", "attention_logit", "fid", *_LOSS, *_COUNT),
    }
)
RESERVED_PREFIXES = ("eps_mse", "fd_")
"""Names in metrics.jsonl, and beginnings of names, that a task's losses must not have."""


def new_state(config: BaseRun, task: Task, world: World) -> TrainState:
    """The state of a run, allocated but not filled: see `fill_fresh` and `checkpointing.restore`. The network is built
    on the meta device and sharded before it gets memory, so no rank ever holds all of it."""
    compute, reduce = COMPUTE[config.train.precision], DTYPES[config.train.reduce_precision]
    model = task.network()
    layouts = parallelise(model, config.parallel, world, compute, reduce)
    return TrainState(Weights(model, layouts, world.device, compute, world.model_group.here), config, world)


def fill_fresh(state: TrainState, task: Task) -> None:
    """Initialise the weights; averages start as a copy of them."""
    state.weights.fill(lambda name, layout, part: view(task.initial(name, layout.shape), part))
    state.averages.start(state.weights.masters)


@dataclass(frozen=True)
class Outcome:
    """The result of a step. `values`: means over the global batch. `fault`: why the step was skipped, "" = applied.
    `flags`: sums over ranks of the flags that each rank passed in."""

    values: dict[str, float]
    fault: str = ""
    flags: tuple[float, ...] = field(default_factory=tuple)


def train_step(state: TrainState, task: Task, batch: Batch, flags: Sequence[float] = ()) -> Outcome:
    """Advance by one step; `batch` is this rank's share of the global batch.

    All ranks must call it together and get the same outcome.
    """
    config, world, weights = state.config.train, state.world, state.weights
    # Forward and backward passes. The sums stay on the device.
    sums = _accumulate(state, task, batch)
    # Squared norms of the local gradients. `shares` counts a parameter once that several ranks hold.
    grads = weights.gradients()
    norms = torch._foreach_norm(grads, 2, torch.float32)  # summed in fp32 whatever the gradients are
    squares = torch.stack(norms).to(state.shares.dtype).square()  # (parameters,)
    # One all-reduce for everything that ranks must agree on: squared norm, sums, flags. Ranks of a tensor-parallel
    # group see the same samples, so that sums and their count are both a multiple: means are the same.
    names = list(sums)
    report = torch.cat(
        [
            torch.stack([squares @ state.shares, *sums.values()]),
            to_device(torch.tensor(list(flags), dtype=squares.dtype), world.device),
        ]
    )
    if world.size > 1:
        dist.all_reduce(report)
    # Decide on the device whether the step is applied, so that the optimiser can be queued without waiting.
    norm = report[0].sqrt() / state.scaler.scale
    limit = state.guard.limit(state.config.guard)
    count = report[1 + names.index("count")]
    loss = report[1 + names.index("loss")] / count.clamp(min=1)
    sound = torch.isfinite(norm) & torch.isfinite(loss) & (loss <= limit) & (count > 0)
    # Start the copy to the host, then queue the optimiser: the copy is complete before the optimiser is.
    host = _HostCopy(report)
    factor = _factor(norm, config.grad_clip, state.scaler.scale)
    lr = learning_rate(config, state.step + 1)
    state.update.queue(grads, lr, sound, state.step, factor, state.updates + 1)
    # The host now learns the result, and updates what it keeps itself: counters, averages, guard, loss scale.
    numbers = host.wait()
    totals = dict(zip(names, numbers[1 : 1 + len(names)], strict=True))
    values = _means(totals)
    values |= {"grad_norm": math.sqrt(numbers[0]) / state.scaler.scale if numbers[0] >= 0 else math.nan, "lr": lr}
    fault = _conclude(state, values, limit, totals["count"] > 0)
    weights.zero_grad()
    return Outcome(values, fault, tuple(numbers[1 + len(names) :]))


def _accumulate(state: TrainState, task: Task, batch: Batch) -> dict[str, Tensor]:
    """Backward passes of all micro-batches; returns the sums of `_sums` over this rank's samples."""
    config, world, model = state.config.train, state.world, state.weights.model
    # The loss is the mean over the global batch. FSDP2 averages gradients over the ranks with different samples, so
    # their number is multiplied back in.
    factor = state.scaler.scale * world.data_parts / config.batch_size
    dtype = COMPUTE[config.precision]
    sums: dict[str, Tensor] = {}
    micros = list(batch.micro(config.micro_batch_size or len(batch)))
    for micro in micros:
        sync_gradients(model, micro is micros[-1])  # replicas exchange gradients once a step, in the last pass
        losses = _without_unreadable(task.losses(model, micro, world.device, dtype), micro)
        (losses["loss"].sum() * factor).backward()
        micro_sums = _sums(losses, len(micro) - len(micro.faults), state.shares.dtype)
        sums = {name: sums[name] + value if sums else value for name, value in micro_sums.items()}
    return sums


def _without_unreadable(losses: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    """The losses with 0 for samples that could not be read, and time -1, which is in no quarter."""
    if not batch.faults:
        return losses
    sound = to_device(torch.tensor(batch.sound), losses["loss"].device)
    return {name: torch.where(sound, values, -1 if name == "time" else 0) for name, values in losses.items()}


def _sums(losses: dict[str, Tensor], count: int, exact: torch.dtype) -> dict[str, Tensor]:
    """Sums over samples by name, their "count", and, where samples have a time, the loss's sum and the count of each
    quarter of the time range. `losses` (B,) become scalars of dtype `exact`."""
    sums = {name: values.detach().to(exact).sum() for name, values in losses.items() if name != "time"}
    loss = losses["loss"].detach().to(exact)
    sums["count"] = torch.full_like(sums["loss"], count)
    if "time" in losses:
        quarter = (losses["time"] * TIME_BUCKETS).floor().long().clamp(max=TIME_BUCKETS - 1)
        for q in range(TIME_BUCKETS):
            inside = quarter == q
            sums[_LOSS[q]] = torch.where(inside, loss, 0).sum()
            sums[_COUNT[q]] = inside.sum().to(exact)
    return sums


def _factor(norm: Tensor, clip: float, scale: float) -> Tensor | None:
    """What gradients are multiplied by: the inverse loss scale, and what clips their norm to `clip` (0 = off)."""
    if not clip and scale == 1.0:
        return None
    factor = torch.ones_like(norm) / scale
    if clip:
        factor = factor * torch.where(norm > clip, clip / norm, 1.0)
    return factor.to(torch.float32)


def _means(totals: dict[str, float]) -> dict[str, float]:
    """Means over the samples that could be read, NaN when there are none; and over each quarter that has samples."""
    count = totals["count"] or math.nan
    values = {name: total / count for name, total in totals.items() if name not in RESERVED}
    for loss, number in zip(_LOSS, _COUNT, strict=True):
        if totals.get(number):
            values[loss] = totals[loss] / totals[number]
    return values


def _conclude(state: TrainState, values: dict[str, float], limit: float, readable: bool) -> str:
    """Update counters, averages, guard and loss scale by the result of a step; returns the fault. `readable`: whether
    any sample could be read."""
    state.step += 1
    if not readable:
        state.guard.left_out += 1
        return "unreadable"
    loss, precision = values["loss"], state.config.train.precision
    finite = math.isfinite(loss) and math.isfinite(values["grad_norm"])
    if finite and loss <= limit:
        state.updates += 1
        state.update.settle(state.updates)
        state.scaler.passed(precision)
        state.guard.accept(loss)
        return ""
    # The logged loss is not scaled: if it is not finite, a smaller loss scale does not help.
    if not finite and math.isfinite(loss) and state.scaler.overflowed():
        return "overflow"
    state.guard.left_out += 1
    return "spike" if finite else "nonfinite"


class _HostCopy:
    """An asynchronous copy of a tensor to the host, started here and waited for later."""

    def __init__(self, numbers: Tensor) -> None:
        self.event: torch.cuda.Event | None = None
        self.numbers = numbers
        if numbers.is_cuda:
            self.numbers = torch.empty_like(numbers, device="cpu", pin_memory=True)
            self.numbers.copy_(numbers, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def wait(self) -> list[float]:
        if self.event is not None:
            self.event.synchronize()
        return self.numbers.tolist()
