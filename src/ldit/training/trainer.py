"""The training loop: batches, steps, log lines, hooks, checkpoints. The Task says what is trained."""

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
from ldit.training import checkpointing
from ldit.training.narrator import Narrator
from ldit.training.saver import Saver, Staging
from ldit.training.state import TrainState
from ldit.training.step import Outcome, train_step
from ldit.training.tasks.task import Hook, Task
from ldit.training.telemetry import Clock, peak_memory

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
BEST = "best"
"""Key of a hook's result: whether to commit this step because it is the best so far."""
# Indices of further flags, after those of the signals.
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
    """Writes the record of a logged step; called on the main process."""
    watchdog: Watchdog
    narrator: Narrator | None = None
    """Of the main process, where the run is to be talked about."""
    cut: Callable[[int], None] = lambda step: None
    """Removes the records of steps after this one; called on the main process."""
    skip: Callable[[list[Fault], int], None] = lambda faults, step: None
    """Records the samples of a step that could not be read; called on the main process."""
    hooks: Sequence[Hook] = field(default_factory=tuple)
    received: list[signal.Signals] = field(default_factory=list)
    """Gets the first signal that this process receives."""
    show: Callable[[int], None] = lambda step: None
    """Shows the trackers what hooks have drawn of a step; called on the main process."""
    data_record: dict[str, Any] | None = None
    """What identifies the training set; committed with every step and compared on resume."""
    flops_per_image: float = 0.0
    peak_flops: float | None = None
    """FLOP/s of all devices together, where known."""

    def __post_init__(self) -> None:
        self.saver = Saver(self.config.train.async_save)
        self.staging = Staging()
        self._best = False

    def fit(self) -> None:
        """Train to the end. When any rank receives a signal, save a checkpoint and raise Stopped; a second signal exits
        at once.

        RunError when a checkpoint cannot be saved, when the guard stops the run, or when whole batches are unreadable.
        """
        with _signals(self.received):
            try:
                self._loop(self.received)
            except Exception:
                self.saver.settle()  # let a save that has begun finish, whatever ended the run
                raise
            finally:
                self.state.averages.settle()  # a thread must not outlive the interpreter

    def _loop(self, received: Sequence[signal.Signals]) -> None:
        state, steps = self.state, self.config.train.steps
        # Allocate the host memory of checkpoints on the saver's thread, while the first steps run.
        self.saver.start(checkpointing.reserve_work(state, self.staging))
        clock = Clock(state.step)
        # The outer loop repeats after a rollback only, which changes the step and the data that follow.
        while state.step < steps:
            for batch in clock.timed(self.batches(state.step, steps, state.offset)):
                self.watchdog.mark(f"step {state.step + 1}")
                # Flags travel with the step's own all-reduce, so all ranks act on them in the same step.
                outcome = train_step(state, self.task, batch, self._flags(received, batch))
                # Unreadable samples, steps that were skipped, failed saves: these may end the run or roll it back.
                self._judge_unreadable(outcome, self._skipped(outcome, batch))
                if self._rolls_back(outcome):
                    clock.restart(state.step)
                    break
                # Hooks before the commit: an evaluation may declare this step the best so far, and worth keeping.
                received_by_any = next((one for one, flag in zip(SIGNALS, outcome.flags, strict=False) if flag), None)
                self._report(outcome, clock)
                self._commit(received_by_any is not None)
                # A signal: the checkpoint has begun; wait until it is on the disk.
                if received_by_any is not None and state.step < steps:
                    self.saver.wait()
                    raise Stopped(received_by_any)
                self._draw(clock)
                self.watchdog.mark(f"data of step {state.step + 1}")
        self.saver.wait()

    def _flags(self, received: Sequence[signal.Signals], batch: Batch) -> list[float]:
        flags = [float(bool(received) and received[0] == one) for one in SIGNALS]
        return [*flags, float(self.saver.failed or self.state.averages.failed), float(len(batch.faults))]

    def _skipped(self, outcome: Outcome, batch: Batch) -> list[Fault]:
        """The samples that any rank could not read, by position, each once: the ranks of a tensor-parallel group read
        the same ones. The main process records them."""
        if not outcome.flags[LEFT_OUT]:
            return []
        world = self.state.world
        reports = world.gather([[f.position, f.where, f.reason] for f in batch.faults])
        by_position = {row[0]: Fault(*row) for rows in reports for row in rows}
        faults = [by_position[position] for position in sorted(by_position)]
        if world.is_main:
            self.skip(faults, self.state.step)
        return faults

    def _judge_unreadable(self, outcome: Outcome, faults: Sequence[Fault]) -> None:
        """Handle a batch of which no sample could be read. RunError on all ranks when too many follow each other, or
        when the run would end without any applied step."""
        if outcome.fault != "unreadable":
            return
        state, config = self.state, self.config
        summary = f"step {state.step}: none of its {config.train.batch_size} samples could be read"
        never_updated = state.step == config.train.steps and not state.updates
        if never_updated or state.guard.left_out > config.guard.limit:
            many = f"{state.guard.left_out} steps in a row were left out (guard.limit {config.guard.limit})"
            why = "no step could be applied" if never_updated else many
            raise RunError(f"{summary}; {why}; the first: {faults[0].reason}")
        logger.warning("%s: left out", summary)

    def _rolls_back(self, outcome: Outcome) -> bool:
        """Handle a failed save and a step that was skipped; True when the state was rolled back to an earlier step.
        RunError ends the run."""
        state, config = self.state, self.config.guard
        # A save failed on some rank since the last step. There it is raised with its reason.
        if outcome.flags[SAVE_FAILED]:
            self.saver.wait()  # raises where it failed
            state.averages.wait()
            raise RunError("a checkpoint could not be saved, or the averages not updated, by another process")
        if outcome.fault not in ("nonfinite", "spike"):
            return False
        # The configuration says what to do: stop, skip the step, or roll back.
        policy = config.spike if outcome.fault == "spike" else config.nonfinite
        loss, norm = outcome.values["loss"], outcome.values["grad_norm"]
        summary = f"step {state.step}: loss {loss:.4g}, gradient norm {norm:.4g}"
        if policy == "stop" or state.guard.left_out > config.limit:
            raise RunError(f"{summary}; the step was not applied, and the run ends (guard.{outcome.fault})")
        if policy == "skip":
            logger.warning("%s: %s, left out", summary, outcome.fault)
            return False
        self._roll_back(summary)
        return True

    def _roll_back(self, summary: str) -> None:
        state, failed = self.state, self.state.step
        offset, rollbacks = state.offset, state.guard.rollbacks + 1
        # A save that has begun must end before steps are looked for.
        self.saver.wait()
        self.watchdog.mark("rollback")
        newest = latest_valid_step(self.out, state.world)
        if newest is None or rollbacks > self.config.guard.limit:
            why = "there is no committed step to go back to" if newest is None else f"{rollbacks - 1} rollbacks already"
            raise RunError(f"{summary}; {why}")
        # Load it, and remove the files of what came after it.
        state.world.run_on_all(lambda: checkpointing.restore(newest[1], state))
        state.world.from_rank0(lambda: quarantine_newer(self.out, newest[0]))
        state.world.from_rank0(lambda: drop_after(self.out, newest[0]))
        # The same data would fail again: skip the samples between that step and the failed one.
        state.offset = offset + (failed - state.step) * self.config.train.batch_size
        state.guard.rollbacks = rollbacks
        if state.world.is_main:
            self.cut(state.step)
        logger.warning("%s: rolled back to step %d, the data since is skipped", summary, state.step)

    def _report(self, outcome: Outcome, clock: Clock) -> None:
        """Run the hooks that are due, and log the step when it is time or something happened."""
        state, train = self.state, self.config.train
        last = state.step == train.steps
        # Hooks run on all ranks. Their time does not count in images per second.
        values: dict[str, Any] = dict(outcome.values)
        due = [hook for hook in self.hooks if _due(hook.every, state.step, last)]
        for hook in (hook for hook in due if not hook.after_save):
            with clock.apart():
                values |= hook.run(state) or {}
            self.watchdog.mark(f"after step {state.step}")
        self._best = bool(values.get(BEST))
        if outcome.fault:
            values["left_out"] = outcome.fault
        # Log the first step, every n-th, the last, skipped ones, and those with a hook's result.
        first = train.log_every and state.step == 1
        if not (due or outcome.fault or first or _due(train.log_every, state.step, last)):
            if self.narrator is not None:
                self.narrator.step(state.step, outcome.values["loss"])
            return
        # Add speed, memory and the loss scale; the main process writes the record.
        values |= clock.rates(state.step, train.batch_size, self.flops_per_image, self.peak_flops)
        values |= {"memory": peak_memory(state.world.device)}
        if state.scaler.scale != 1.0:
            values["loss_scale"] = state.scaler.scale
        if state.world.is_main:
            record = {"step": state.step, **{name: _plain(value) for name, value in values.items()}}
            self.write(record)
            if self.narrator is not None:
                self.narrator.record(record)

    def _draw(self, clock: Clock) -> None:
        """Run the hooks that are due after the save."""
        step, last = self.state.step, self.state.step == self.config.train.steps
        due = [hook for hook in self.hooks if hook.after_save and _due(hook.every, step, last)]
        for hook in due:
            with clock.apart():
                hook.run(self.state)
            self.watchdog.mark(f"after step {step}")
        if due and self.state.world.is_main:
            self.show(step)

    def _commit(self, stopping: bool) -> None:
        """Start a save if one is due. All ranks decide the same."""
        state, train = self.state, self.config.train
        last = state.step == train.steps
        snapshot = _due(self.config.ema.snapshot_every, state.step, last)
        step = last or stopping or self._best or _due(train.checkpoint_every, state.step, False)
        if not (step or snapshot):
            return
        self.watchdog.mark("save")
        self.saver.wait()  # the previous save must be done with the staging memory
        if step:
            state.guard.rollbacks = 0
        spec, record, mark = self.task.spec, self.data_record, self.watchdog.mark
        self.saver.start(checkpointing.save_work(self.out, state, spec, self.staging, record, mark, step, snapshot))


def _due(every: int, step: int, last: bool) -> bool:
    return every > 0 and (last or step % every == 0)


def _plain(value: Any) -> Any:
    """The value with null for NaN and infinity, which JSON lacks."""
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def _signals(received: list[signal.Signals]) -> Any:
    """`received` gets the first SIGINT, SIGTERM or SIGUSR1; from then on a signal has its default effect. The old
    handlers are restored at the end."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        logger.warning("%s: saving a checkpoint after this step; a second signal exits at once", received[0].name)
        for one in SIGNALS:
            signal.signal(one, signal.SIG_DFL)

    old = {one: signal.signal(one, receive) for one in SIGNALS}
    try:
        yield
    finally:
        for one, handler in old.items():
            signal.signal(one, handler)
