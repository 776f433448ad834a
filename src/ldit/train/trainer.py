"""The loop: batches in, steps, log lines, hooks, commits. What is trained is the Task's business."""

import math
import signal
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from ldit.checkpoint.run import drop_after, latest_valid_step, quarantine_newer
from ldit.config.run import BaseRun
from ldit.data.batch import Batch, Fault
from ldit.errors import RunError
from ldit.log import logger
from ldit.parallel.watchdog import Watchdog
from ldit.storage.signals import Stopped
from ldit.train import checkpointing
from ldit.train.saver import Saver, Staging
from ldit.train.state import TrainState
from ldit.train.step import Outcome, train_step
from ldit.train.tasks.task import Hook, Task
from ldit.train.telemetry import Clock, peak_memory

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
BEST = "best"
"""What a hook says of a step that is to be committed because it is the best so far."""
# Places of these flags, after those of the signals.
SAVE_FAILED = len(SIGNALS)
LEFT_OUT = SAVE_FAILED + 1


@dataclass
class Trainer:
    """Trains `task` from `state.step` to `config.train.steps` over `batches(first, last, offset)`."""

    config: BaseRun
    task: Task
    state: TrainState
    batches: Callable[[int, int, int], Iterable[Batch]]
    out: Path
    write: Callable[[dict[str, Any]], None]
    """Takes the record of a logged step, on the first process."""
    watchdog: Watchdog
    cut: Callable[[int], None] = lambda step: None
    """Takes back the records of later steps than this, on the first process."""
    skip: Callable[[list[Fault], int], None] = lambda faults, step: None
    """Takes the samples of a step that could not be read, on the first process."""
    hooks: Sequence[Hook] = field(default_factory=tuple)
    data_record: dict[str, Any] | None = None
    """What identifies the training set; committed with every step and compared on resume."""
    flops_per_image: float = 0.0
    peak_flops: float | None = None
    """FLOP/s of the devices all together, where known."""

    def __post_init__(self) -> None:
        self.saver = Saver(self.config.train.async_save)
        self.staging = Staging()
        self._best = False

    def fit(self) -> None:
        """Run to the end; Stopped after a checkpoint when a signal came to any process. A second signal exits at once.

        RunError when a checkpoint cannot be saved, when the guard ends the run, or when no sample can be read any more.
        """
        with _signals() as received:
            try:
                self._loop(received)
            except Exception:
                self.saver.settle()  # a commit under way stands, whatever ends the run
                raise

    def _loop(self, received: Sequence[signal.Signals]) -> None:
        state, steps = self.state, self.config.train.steps
        self.saver.start(checkpointing.reserve_work(state, self.staging))
        clock = Clock(state.step)
        while state.step < steps:
            for batch in clock.timed(self.batches(state.step, steps, state.offset)):
                self.watchdog.mark(f"step {state.step + 1}")
                outcome = train_step(state, self.task, batch, self._flags(received, batch))
                self._judge_unreadable(outcome, self._skipped(outcome, batch))
                if self._rolls_back(outcome):
                    clock.restart(state.step)
                    break
                received_by_any = next((one for one, flag in zip(SIGNALS, outcome.flags, strict=False) if flag), None)
                self._report(outcome, clock)
                self._commit(received_by_any is not None)
                if received_by_any is not None and state.step < steps:
                    self.saver.wait()
                    raise Stopped(received_by_any)
                self.watchdog.mark(f"data of step {state.step + 1}")
        self.saver.wait()

    def _flags(self, received: Sequence[signal.Signals], batch: Batch) -> list[float]:
        flags = [float(bool(received) and received[0] == one) for one in SIGNALS]
        return [*flags, float(self.saver.failed), float(len(batch.faults))]

    def _skipped(self, outcome: Outcome, batch: Batch) -> list[Fault]:
        """The samples that any process could not read, in order of position; made known by the first process.
        Tensor-parallel neighbours read the same ones."""
        if not outcome.flags[LEFT_OUT]:
            return []
        world = self.state.world
        reports = world.gather([[f.position, f.where, f.reason] for f in batch.faults])
        found = {row[0]: Fault(*row) for rows in reports for row in rows}
        faults = [found[position] for position in sorted(found)]
        if world.is_main:
            self.skip(faults, self.state.step)
        return faults

    def _judge_unreadable(self, outcome: Outcome, faults: Sequence[Fault]) -> None:
        """RunError, alike on every process, when whole batches cannot be read: where a run would go on so, or has come
        to its end without a step that was applied."""
        if outcome.fault != "unreadable":
            return
        state, config = self.state, self.config
        told = f"step {state.step}: none of its {config.train.batch_size} samples could be read"
        unlearnt = state.step == config.train.steps and not state.updates
        if unlearnt or state.guard.left_out > config.guard.limit:
            row = f"{state.guard.left_out} steps in a row were left out (guard.limit {config.guard.limit})"
            raise RunError(f"{told}; {'no step could be applied' if unlearnt else row}; the first: {faults[0].reason}")
        logger.warning("%s: left out", told)

    def _rolls_back(self, outcome: Outcome) -> bool:
        """Deal with a step that was left out; True when the state is an earlier one now. RunError ends the run."""
        state, config = self.state, self.config.guard
        if outcome.flags[SAVE_FAILED]:
            self.saver.wait()  # raises where it failed
            raise RunError("a checkpoint could not be saved by another process")
        if outcome.fault not in ("nonfinite", "spike"):
            return False
        policy = config.spike if outcome.fault == "spike" else config.nonfinite
        told = f"step {state.step}: loss {outcome.values['loss']:.4g}, gradient norm {outcome.values['grad_norm']:.4g}"
        if policy == "stop" or state.guard.left_out > config.limit:
            raise RunError(f"{told}; it was applied nowhere, and the run ends (guard.{outcome.fault})")
        if policy == "skip":
            logger.warning("%s: %s, left out", told, outcome.fault)
            return False
        self._roll_back(told)
        return True

    def _roll_back(self, told: str) -> None:
        state, failed = self.state, self.state.step
        offset, rollbacks = state.offset, state.guard.rollbacks + 1
        self.saver.wait()
        self.watchdog.mark("rollback")
        newest = latest_valid_step(self.out, state.world)
        if newest is None or rollbacks > self.config.guard.limit:
            why = "there is no committed step to go back to" if newest is None else f"{rollbacks - 1} rollbacks already"
            raise RunError(f"{told}; {why}")
        state.world.run_on_all(lambda: checkpointing.restore(newest[1], state))
        state.world.from_rank0(lambda: quarantine_newer(self.out, newest[0]))
        state.world.from_rank0(lambda: drop_after(self.out, newest[0]))
        # The same data would lead to the same place: go on with what comes after it.
        state.offset = offset + (failed - state.step) * self.config.train.batch_size
        state.guard.rollbacks = rollbacks
        if state.world.is_main:
            self.cut(state.step)
        logger.warning("%s: back to step %d, past the data since", told, state.step)

    def _report(self, outcome: Outcome, clock: Clock) -> None:
        state, train = self.state, self.config.train
        last = state.step == train.steps
        values: dict[str, Any] = dict(outcome.values)
        due = [hook for hook in self.hooks if _due(hook.every, state.step, last)]
        for hook in due:
            with clock.apart():
                values |= hook.run(state) or {}
            self.watchdog.mark(f"after step {state.step}")
        self._best = bool(values.get(BEST))
        if outcome.fault:
            values["left_out"] = outcome.fault
        first = train.log_every and state.step == 1
        if not (due or outcome.fault or first or _due(train.log_every, state.step, last)):
            return
        values |= clock.rates(state.step, train.batch_size, self.flops_per_image, self.peak_flops)
        values |= {"memory": peak_memory(state.world.device)}
        if state.scaler.scale != 1.0:
            values["loss_scale"] = state.scaler.scale
        if state.world.is_main:
            record = {"step": state.step, **{name: _plain(value) for name, value in values.items()}}
            self.write(record)
            logger.info(_line(record, train.steps, train.batch_size))

    def _commit(self, stopping: bool) -> None:
        """Start saving when it is time. All processes decide alike."""
        state, train = self.state, self.config.train
        last = state.step == train.steps
        snapshot = _due(self.config.ema.snapshot_every, state.step, last)
        step = last or stopping or self._best or _due(train.checkpoint_every, state.step, False)
        if not (step or snapshot):
            return
        self.watchdog.mark("save")
        self.saver.wait()  # the staging memory is free again
        if step:
            state.guard.rollbacks = 0
        spec, record, mark = self.task.spec, self.data_record, self.watchdog.mark
        self.saver.start(checkpointing.save_work(self.out, state, spec, self.staging, record, mark, step, snapshot))


def _due(every: int, step: int, last: bool) -> bool:
    return every > 0 and (last or step % every == 0)


def _plain(value: Any) -> Any:
    """JSON has no nan."""
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(record: dict[str, Any], steps: int, batch_size: int) -> str:
    remaining = (steps - record["step"]) * batch_size / max(record["images_per_second"], 1e-9)
    shown = ("loss", "grad_norm", "lr", "eps_mse", "accuracy", "mfu", "left_out")
    distances = [name for name in record if name == "fid" or name.startswith("fd_")]
    parts = [_shown(name, record[name]) for name in (*shown, *distances) if name in record]
    eta = f"{int(remaining // 3600)}:{int(remaining % 3600 // 60):02d}:{int(remaining % 60):02d}"
    return f"step {record['step']}/{steps}  {'  '.join(parts)}  {record['images_per_second']:.1f} images/s  left {eta}"


def _shown(name: str, value: Any) -> str:
    return f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"


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
        for one in SIGNALS:
            signal.signal(one, signal.SIG_DFL)

    old = {one: signal.signal(one, receive) for one in SIGNALS}
    try:
        yield received
    finally:
        for one, handler in old.items():
            signal.signal(one, handler)
