"""The loop: batches in, steps, log lines, hooks, commits. What is trained is the Task's business."""

import signal
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from ldit.config.run import RunConfig
from ldit.data.batch import Batch
from ldit.log import MetricsFile, logger
from ldit.train import state_io
from ldit.train.step import TrainState, train_step
from ldit.train.task import Task

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 138}


class Stopped(Exception):
    """A signal ended the run after a checkpoint; `code` is the exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(f"stopped with exit code {code}")
        self.code = code


@dataclass(frozen=True)
class Hook:
    """Called after a step that `every` divides, and after the last one; its result goes into metrics.jsonl."""

    every: int
    run: Callable[[TrainState], dict[str, Any] | None]


@dataclass
class Trainer:
    """Trains `task` from `state.step` to `config.train.steps` over `batches(first, last)`."""

    config: RunConfig
    task: Task
    state: TrainState
    batches: Callable[[int, int], Iterable[Batch]]
    out: Path
    hooks: Sequence[Hook] = field(default_factory=tuple)
    data_record: dict[str, Any] | None = None
    """What identifies the training set; committed with every step and compared on resume."""

    def fit(self) -> None:
        """Run to the end; Stopped after a checkpoint when a signal came. A second signal exits at once."""
        train, state = self.config.train, self.state
        metrics = MetricsFile(self.out / "metrics.jsonl", state.step)
        started, first = time.perf_counter(), state.step
        with _signals() as received:
            for batch in self.batches(state.step, train.steps):
                values: dict[str, Any] = train_step(state, self.task, batch)
                last = state.step == train.steps
                due = [hook for hook in self.hooks if _due(hook.every, state.step, last)]
                for hook in due:
                    values = {**values, **(hook.run(state) or {})}
                if due or _due(train.log_every, state.step, last) or (train.log_every and state.step == 1):
                    rate = (state.step - first) * train.batch_size / (time.perf_counter() - started)
                    record = {"step": state.step, **values, "images_per_second": round(rate, 2)}
                    metrics.write(record)
                    logger.info(_line(record, train.steps, train.batch_size))
                if last or received or _due(train.checkpoint_every, state.step, False):
                    state_io.save(self.out, state, self.task.spec, train.keep, self.data_record)
                if received and not last:
                    raise Stopped(EXIT_CODES[received[0]])


def _due(every: int, step: int, last: bool) -> bool:
    return every > 0 and (last or step % every == 0)


def _line(record: dict[str, Any], steps: int, batch_size: int) -> str:
    remaining = (steps - record["step"]) * batch_size / max(record["images_per_second"], 1e-9)
    shown = ("loss", "grad_norm", "lr", "eps_mse")
    parts = [f"{name} {record[name]:.4g}" for name in shown if name in record]
    eta = f"{int(remaining // 3600)}:{int(remaining % 3600 // 60):02d}:{int(remaining % 60):02d}"
    return f"step {record['step']}/{steps}  {'  '.join(parts)}  {record['images_per_second']:.1f} images/s  left {eta}"


@contextmanager
def _signals() -> Any:
    """Collects the first SIGINT, SIGTERM or SIGUSR1; afterwards their default handlers stand again."""
    received: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may set handlers
        return

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        logger.warning("%s: a checkpoint follows at the end of this step; once more exits at once", received[0].name)
        for one in EXIT_CODES:
            signal.signal(one, signal.SIG_DFL)

    old = {one: signal.signal(one, receive) for one in EXIT_CODES}
    try:
        yield received
    finally:
        for one, handler in old.items():
            signal.signal(one, handler)
