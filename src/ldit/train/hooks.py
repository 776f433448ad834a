"""What a run does beside its steps: held-out loss, images, attention logits. Hooks run on every process alike,
because a network whose weights are shared out needs all of them for every forward pass."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ldit.data.batch import Batch, Fault
from ldit.data.loader import load_batch
from ldit.data.samples import Samples
from ldit.log import logger
from ldit.precision import COMPUTE
from ldit.storage.names import SAMPLES
from ldit.train.state import TrainState
from ldit.train.tasks.task import HookContext, Task
from ldit.train.telemetry import largest_logits

HELDOUT_BATCH = 64
PROBE_IMAGES = 2


def heldout_hook(
    task: Task, data: Samples, count: int, context: HookContext
) -> Callable[[TrainState], dict[str, float]]:
    """Means of the task's values of the EMA weights on images kept from training, with fixed times and noise. With
    data.bad "skip" images that cannot be read are left out and made known; without any that can, so is that."""
    count = min(count, len(data))
    indices = [i * len(data) // count for i in range(count)]

    def run(state: TrainState) -> dict[str, float]:
        world, dtype = state.world, COMPUTE[state.config.train.precision]
        sums: dict[str, list[float]] = {}
        faults: list[Fault] = []
        with state.weights.swapped_in(state.averages.main) as model, eager(), torch.no_grad():
            for first in range(0, count, HELDOUT_BATCH * world.data_parts):
                # Every process takes part in every pass; one that has no image left repeats and does not count.
                mine = list(range(first, min(first + HELDOUT_BATCH * world.data_parts, count)))
                mine = mine[world.data_part :: world.data_parts]
                rows = mine or [0]
                batch = load_batch(data, rows, [indices[row] for row in rows], None, state.config.data.bad)
                faults += batch.faults
                readable = batch.readable()
                found = task.evaluate(model, readable if len(readable) else batch, world.device, dtype)
                context.watchdog.mark("held-out loss")
                counts = mine and len(readable) and world.tp_index == 0
                for name, values in found.items() if counts else ():
                    total = sums.setdefault(name, [0.0, 0.0])
                    total[0] += values.double().sum().item()
                    total[1] += len(values)
        reports = world.gather(sums)
        report_unreadable(faults, data, context, state)
        names = dict.fromkeys(name for report in reports for name in report)
        totals = {name: [sum(r[name][i] for r in reports if name in r) for i in (0, 1)] for name in names}
        if count and not totals:
            logger.warning("step %d: nothing is measured: none of the %d images can be read", state.step, count)
        return {name: total / number for name, (total, number) in totals.items() if number}

    return run


def report_unreadable(faults: Iterable[Fault], data: Samples, context: HookContext, state: TrainState) -> None:
    """Make known the samples of `data` that any process could not read; all call it together. Held-out ones are called
    so, for shards of a cache have the same names on both sides."""
    reports = state.world.gather([astuple(fault) for fault in faults])
    found = {row[0]: Fault(*row) for rows in reports for row in rows}
    if found and state.world.is_main:
        mark = "held-out " if data is context.heldout else ""
        context.skip([replace(found[i], where=f"{mark}{found[i].where}") for i in sorted(found)], state.step)


def save_grid(out: Path, step: int, grid: Image.Image) -> None:
    """RUN/samples/step-….png; an image is no reason to end a run."""
    path = out / SAMPLES / f"step-{step:08d}.png"
    try:
        path.parent.mkdir(exist_ok=True)
        grid.save(path)
    except OSError as error:
        logger.warning("%s was not written: %s", path, error.strerror or error)


def attention_hook(task: Task, data: Samples) -> Callable[[TrainState], dict[str, list[float]]]:
    """Largest attention logit of each layer on two training images with fixed noise: where it grows without end,
    training will not stay stable (Dehghani et al. 2023). They are read when it is first called."""
    indices = [i * len(data) // PROBE_IMAGES for i in range(PROBE_IMAGES)]
    probe: list[Batch] = []

    def run(state: TrainState) -> dict[str, list[float]]:
        world, dtype = state.world, COMPUTE[state.config.train.precision]
        if not probe:
            probe.append(load_batch(data, range(PROBE_IMAGES), indices, None, state.config.data.bad))

        def forward() -> None:
            task.evaluate(state.weights.model, probe[0], world.device, dtype)

        with eager(), torch.no_grad():
            logits = largest_logits(state.weights.model, forward, world)
            return {"attention_logit": logits} if logits else {}

    return run


def eager() -> AbstractContextManager[Any]:
    """Compiled blocks run uncompiled: hooks see inside them, and other batch sizes compile nothing."""
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance
