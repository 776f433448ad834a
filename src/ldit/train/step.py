"""One optimiser step over a global batch: micro-batches, gradient norm, verdict, optimiser, averages.

The host waits once a step, for a handful of numbers that were ready before the optimiser began; what must not be
applied is refused on the device.
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
from ldit.train.optim import learning_rate
from ldit.train.state import TrainState
from ldit.train.tasks.inputs import to_device
from ldit.train.tasks.task import Task
from ldit.train.weights import Weights

TIME_BUCKETS = 4
_LOSS, _COUNT = ([f"{name}_q{q + 1}" for q in range(TIME_BUCKETS)] for name in ("loss", "count"))
RESERVED = frozenset({"count", "time", "lr", "grad_norm", "step", "best", "left_out", "memory", *_LOSS, *_COUNT})
"""Names in metrics.jsonl that a task's losses must not have."""


def new_state(config: BaseRun, task: Task, world: World) -> TrainState:
    """The state of a run, with memory and without numbers: the network is built on the meta device, shared out, and
    given memory then. See `fill_fresh` and `checkpointing.restore`."""
    compute, reduce = COMPUTE[config.train.precision], DTYPES[config.train.reduce_precision]
    model = task.network()
    layouts = parallelise(model, config.parallel, world, compute, reduce)
    return TrainState(Weights(model, layouts, world.device, compute, world.model_group.here), config, world)


def fill_fresh(state: TrainState, task: Task) -> None:
    """The weights of a fresh network; averages begin as the weights."""
    state.weights.fill(lambda name, layout, part: view(task.initial(name, layout.shape), part))
    state.averages.start(state.weights.masters)


@dataclass(frozen=True)
class Outcome:
    """What a step did. `values` are means over the global batch; `fault` says why it was left out, "" = applied;
    `flags` are the sums over processes of what each brought along."""

    values: dict[str, float]
    fault: str = ""
    flags: tuple[float, ...] = field(default_factory=tuple)


def train_step(state: TrainState, task: Task, batch: Batch, flags: Sequence[float] = ()) -> Outcome:
    """Advance by one step; `batch` is this process's share of the global batch.

    All processes must call it together and get the same outcome.
    """
    config, world, weights = state.config.train, state.world, state.weights
    sums = _accumulate(state, task, batch)
    grads = weights.gradients()
    squares = torch.stack(torch._foreach_norm(grads)).to(state.shares.dtype).square()
    names = list(sums)
    report = torch.cat(
        [
            torch.stack([squares @ state.shares, *(sums[name] / world.tp for name in names)]),
            to_device(torch.tensor(list(flags), dtype=squares.dtype), world.device),
        ]
    )
    if world.size > 1:
        dist.all_reduce(report)
    norm = report[0].sqrt() / state.scaler.scale
    limit = state.guard.limit(state.config.guard)
    count = report[1 + names.index("count")]
    loss = report[1 + names.index("loss")] / count.clamp(min=1)
    sound = torch.isfinite(norm) & torch.isfinite(loss) & (loss <= limit) & (count > 0)
    host = _HostCopy(report)
    _scale(grads, norm, config.grad_clip, state.scaler.scale)
    lr = learning_rate(config, state.step + 1)
    state.optimizer.step(lr, sound)
    numbers = host.wait()
    totals = dict(zip(names, numbers[1 : 1 + len(names)], strict=True))
    values = _means(totals)
    values |= {"grad_norm": math.sqrt(numbers[0]) / state.scaler.scale if numbers[0] >= 0 else math.nan, "lr": lr}
    fault = _conclude(state, values, limit, totals["count"] > 0)
    weights.zero_grad()
    return Outcome(values, fault, tuple(numbers[1 + len(names) :]))


def _accumulate(state: TrainState, task: Task, batch: Batch) -> dict[str, Tensor]:
    """Backward passes of all micro-batches; sums of the losses over this process's samples, and over those of each
    quarter of the time range, with their number."""
    config, world, model = state.config.train, state.world, state.weights.model
    # FSDP2 takes the mean over the processes that see different samples.
    factor = state.scaler.scale * world.data_parts / config.batch_size
    dtype = COMPUTE[config.precision]
    sums: dict[str, Tensor] = {}
    micros = list(batch.micro(config.micro_batch_size or len(batch)))
    for micro in micros:
        sync_gradients(model, micro is micros[-1])
        losses = _sound_ones(task.losses(model, micro, world.device, dtype), micro)
        # A sample that could not be read counts as one without loss.
        (losses["loss"].sum() * factor).backward()
        found = _sums(losses, len(micro) - len(micro.faults), state.shares.dtype)
        sums = {name: sums[name] + value if sums else value for name, value in found.items()}
    return sums


def _sound_ones(losses: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
    """The values with zeros in the rows of samples that could not be read, whose time is in no quarter."""
    if not batch.faults:
        return losses
    sound = to_device(torch.tensor(batch.sound), losses["loss"].device)
    return {name: torch.where(sound, values, -1 if name == "time" else 0) for name, values in losses.items()}


def _sums(losses: dict[str, Tensor], count: int, exact: torch.dtype) -> dict[str, Tensor]:
    """Sums over samples by name, their "count", and, where samples have a time, sums and counts of each quarter."""
    found = {name: values.detach().to(exact).sum() for name, values in losses.items() if name != "time"}
    loss = losses["loss"].detach().to(exact)
    found["count"] = torch.full_like(found["loss"], count)
    if "time" in losses:
        quarter = (losses["time"] * TIME_BUCKETS).floor().long().clamp(max=TIME_BUCKETS - 1)
        for q in range(TIME_BUCKETS):
            inside = quarter == q
            found[_LOSS[q]] = torch.where(inside, loss, 0).sum()
            found[_COUNT[q]] = inside.sum().to(exact)
    return found


@torch.no_grad()
def _scale(grads: list[Tensor], norm: Tensor, clip: float, scale: float) -> None:
    """Undo the loss scale, and shrink gradients longer than `clip` to it, in one pass."""
    if not clip and scale == 1.0:
        return
    factor = torch.ones_like(norm) / scale
    if clip:
        factor = factor * torch.where(norm > clip, clip / norm, 1.0)
    torch._foreach_mul_(grads, factor.to(torch.float32))


def _means(totals: dict[str, float]) -> dict[str, float]:
    """Means over the samples that could be read, and over those of each quarter of the time range that has any; NaN
    where none could be."""
    count = totals["count"] or math.nan
    values = {name: total / count for name, total in totals.items() if name not in RESERVED}
    for loss, number in zip(_LOSS, _COUNT, strict=True):
        if totals.get(number):
            values[loss] = totals[loss] / totals[number]
    return values


def _conclude(state: TrainState, values: dict[str, float], limit: float, readable: bool) -> str:
    """What the host adds to a step once it knows the verdict; returns the fault. `readable`: any sample was."""
    state.step += 1
    if not readable:
        state.guard.left_out += 1
        return "unreadable"
    loss, precision = values["loss"], state.config.train.precision
    finite = math.isfinite(loss) and math.isfinite(values["grad_norm"])
    if finite and loss <= limit:
        state.updates += 1
        state.averages.update(state.weights.masters, state.updates)
        state.weights.sync_to_model()
        state.scaler.passed(precision)
        state.guard.accept(loss)
        return ""
    # The loss itself is not scaled: where it is not finite, another scale does not help.
    if not finite and math.isfinite(loss) and state.scaler.overflowed():
        return "overflow"
    state.guard.left_out += 1
    return "spike" if finite else "nonfinite"


class _HostCopy:
    """Numbers on their way to the host: asked for before the optimiser is queued, waited for after."""

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
