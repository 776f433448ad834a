"""Hooks between the steps of a run: held-out loss, sample grids, attention logits.

They run on every rank: a sharded network needs all of them for every forward pass.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import astuple, replace
from io import BytesIO
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
from ldit.storage.outputs import put
from ldit.training.state import TrainState
from ldit.training.tasks.task import HookContext, Task
from ldit.training.telemetry import largest_logits

HELDOUT_BATCH = 64
PROBE_IMAGES = 2


def heldout_hook(
    task: Task, data: Samples, count: int, context: HookContext
) -> Callable[[TrainState], dict[str, float]]:
    """A hook that evaluates the EMA weights on `count` held-out images, with fixed times and noise, and returns the
    means of the task's values. With data.bad "skip", images that cannot be read are left out and reported."""
    # Evenly spaced indices: data sorted by class is then covered evenly.
    count = min(count, len(data))
    indices = [i * len(data) // count for i in range(count)]

    def run(state: TrainState) -> dict[str, float]:
        world, dtype = state.world, COMPUTE[state.config.train.precision]
        sums: dict[str, list[float]] = {}
        faults: list[Fault] = []
        with state.weights.swapped_in(state.averages.main) as model, eager(), torch.no_grad():
            for first in range(0, count, HELDOUT_BATCH * world.data_parts):
                # Every rank takes part in every pass. A rank without an image evaluates the first one, uncounted.
                mine = list(range(first, min(first + HELDOUT_BATCH * world.data_parts, count)))
                mine = mine[world.data_part :: world.data_parts]
                rows = mine or [0]
                batch = load_batch(data, rows, [indices[row] for row in rows], None, state.config.data.bad)
                faults += batch.faults
                readable = batch.readable()
                results = task.evaluate(model, readable if len(readable) else batch, world.device, dtype)
                context.watchdog.mark("held-out loss")
                # The ranks of a tensor-parallel group have the same images: one of them counts.
                counts = mine and len(readable) and world.tp_index == 0
                for name, values in results.items() if counts else ():
                    total = sums.setdefault(name, [0.0, 0.0])
                    total[0] += values.double().sum().item()
                    total[1] += len(values)
        # Means over all ranks. A value may cover only some of the images, so each name has its own count.
        reports = world.gather(sums)
        report_unreadable(faults, data, context, state)
        names = dict.fromkeys(name for report in reports for name in report)
        totals = {name: [sum(r[name][i] for r in reports if name in r) for i in (0, 1)] for name in names}
        if count and not totals:
            logger.warning("step %d: no held-out value: none of the %d images can be read", state.step, count)
        return {name: total / number for name, (total, number) in totals.items() if number}

    return run


def report_unreadable(faults: Iterable[Fault], data: Samples, context: HookContext, state: TrainState) -> None:
    """Report the samples of `data` that any rank could not read; all ranks call it together. Held-out samples are
    marked as such, because the shards of training and held-out caches have the same names."""
    reports = state.world.gather([astuple(fault) for fault in faults])
    by_position = {row[0]: Fault(*row) for rows in reports for row in rows}
    if by_position and state.world.is_main:
        mark = "held-out " if data is context.heldout else ""
        ordered = [by_position[position] for position in sorted(by_position)]
        context.skip([replace(fault, where=f"{mark}{fault.where}") for fault in ordered], state.step)


def save_grid(out: Path, step: int, draw: Callable[[], Image.Image]) -> None:
    """Draw a grid and write it to RUN/samples/step-….png. Whatever fails is logged: no grid is worth a run."""
    path = out / SAMPLES / f"step-{step:08d}.png"
    try:
        data = BytesIO()
        draw().save(data, "PNG")
        path.parent.mkdir(exist_ok=True)
        put(path, data.getvalue())
        logger.info("samples: %s", path)
    except Exception as error:
        logger.warning("step %d: no sample grid: %s", step, " ".join(f"{error}".split()) or type(error).__name__)


def attention_hook(task: Task, data: Samples) -> Callable[[TrainState], dict[str, list[float]]]:
    """A hook that returns the largest attention logit of each layer, on two training images with fixed noise. When it
    keeps growing, training becomes unstable (Dehghani et al. 2023). The images are read at the first call."""
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
    """Run compiled blocks eagerly: module hooks then work, and other batch sizes trigger no recompilation."""
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance
