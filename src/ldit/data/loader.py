"""Batches by step, read ahead by threads (Pillow and numpy release the interpreter while they work)."""

from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from threading import Event

import torch

from ldit.config.sections import BadImages, DataConfig
from ldit.data.batch import Batch, Fault
from ldit.data.order import EpochOrder
from ldit.data.samples import Samples
from ldit.data.workers import Job, Stuck, Workers
from ldit.errors import DataError, RunError
from ldit.rng import uniform

AHEAD = 2  # batches in the making while the consumer works on one


def load_batch(
    data: Samples,
    positions: Sequence[int],
    indices: Sequence[int],
    flip_seed: int | None,
    bad: BadImages = "stop",
) -> Batch:
    """The samples `indices`; with `flip_seed`, half of them mirrored, each by its own position's random number.

    With `bad` "stop" DataError names the first bad sample; with "skip" bad samples are listed in the batch. What is the
    machine's fault (RunError) is raised with either.
    """
    reading = _Reading(data, positions, indices, flip_seed, bad)
    reading.fill(0, len(indices))
    return reading.batch()


class _Reading:
    """A batch whose rows are filled from several threads, each its own rows."""

    def __init__(
        self, data: Samples, positions: Sequence[int], indices: Sequence[int], flip_seed: int | None, bad: BadImages
    ) -> None:
        self.data, self.positions, self.indices = data, positions, indices
        self.flip_seed, self.bad = flip_seed, bad
        self.inputs = torch.empty(len(indices), *data.shape)
        self.labels = torch.empty(len(indices), dtype=torch.int64)
        self.faults: dict[int, str] = {}

    def fill(self, first: int, last: int, stop: Event | None = None, job: Job | None = None) -> None:
        """Rows first … last-1; ends between two samples once `stop` is set."""
        inputs, labels = self.inputs.numpy(), self.labels.numpy()
        for row in range(first, last):
            if stop is not None and stop.is_set():
                return
            if job is not None:
                job.at(row)
            position, flip = self.positions[row], False
            if self.flip_seed is not None:
                flip = uniform(self.flip_seed, "flip", 0, position) < 0.5
            try:
                labels[row] = self.data.read(self.indices[row], flip, inputs[row])
            except DataError as error:
                if self.bad == "stop":
                    hint = "ldit data check lists bad images, --data.bad skip leaves them out"
                    raise DataError(f"{error} ({hint})") from (error.__cause__ or error)
                inputs[row], labels[row] = 0, 0
                self.faults[row] = str(error)

    def batch(self) -> Batch:
        faults = tuple(
            Fault(self.positions[row], self.data.where(self.indices[row]), self.faults[row])
            for row in sorted(self.faults)
        )
        return Batch(self.inputs, self.labels, tuple(self.positions), faults)


@dataclass(frozen=True)
class _Pending:
    reading: _Reading
    parts: list[Job]
    timeout: float

    def batch(self) -> Batch:
        """Wait for the rows. Of several errors the first row's is raised, whatever the number of threads; RunError
        names the thread and the sample that take longer than `timeout` seconds."""
        for part in self.parts:
            try:
                part.finish(self.timeout)
            except Stuck as stuck:
                data = self.reading.data
                where = data.where(self.reading.indices[stuck.item])
                raise RunError(f"{data.root}: {where} cannot be read: {stuck} (data.timeout)") from None
        return self.reading.batch()


class Loader:
    """One process's share of the batches of a run; step s is the same batch at every call and on every process.

    The global batch of `batch_size` samples is cut into `parts` equal runs of positions; this loader gives run `part`.
    `workers` threads share the reading of a batch and work AHEAD batches in advance; 0 reads on the caller's thread.
    The values do not depend on it. ValueError when `parts` does not divide the batch.
    """

    def __init__(
        self,
        data: Samples,
        batch_size: int,
        seed: int,
        flip: bool,
        workers: int = 2,
        part: int = 0,
        parts: int = 1,
        bad: BadImages = "stop",
        timeout: float = DataConfig.timeout,
    ) -> None:
        if parts < 1 or batch_size % parts or not 0 <= part < parts:
            raise ValueError(f"a batch of {batch_size} has no part {part} of {parts}")
        self.data, self.batch_size, self.workers = data, batch_size, workers
        self.part, self.share = part, batch_size // parts
        self.order = EpochOrder(len(data), seed)
        self.flip_seed = seed if flip else None
        self.bad, self.timeout = bad, timeout

    def from_step(self, first: int, last: int, offset: int = 0) -> Generator[Batch, None, None]:
        """The share of steps first … last-1, in order; step s of all processes together takes positions
        offset + s·batch_size … of the stream. Positions of a Batch are those of the stream.

        An error comes at the step of the sample it names. `close()` ends the threads as soon as each has read the
        sample it is at; a consumer that may fail between two batches should use `contextlib.closing`.
        """
        steps = range(first, last)
        if not self.workers:
            return (self._reading(step, offset, fill=True).batch() for step in steps)
        return self._ahead(steps, offset)

    def _ahead(self, steps: range, offset: int) -> Generator[Batch, None, None]:
        upcoming, stop = iter(steps), Event()
        pending: deque[_Pending] = deque()
        workers, patience = Workers(self.workers, "loader"), self.timeout
        try:
            while True:
                while len(pending) <= AHEAD and (step := next(upcoming, None)) is not None:
                    pending.append(self._submit(workers, self._reading(step, offset), stop))
                if not pending:
                    return
                yield pending.popleft().batch()
        except RunError:
            patience = 0.0  # do not wait for threads: one hangs, or a read failed and others may hang
            raise
        finally:
            stop.set()
            workers.close(patience)

    def _reading(self, step: int, offset: int, fill: bool = False) -> _Reading:
        start = offset + step * self.batch_size + self.part * self.share
        positions = range(start, start + self.share)
        indices = self.order.between(positions.start, positions.stop)
        reading = _Reading(self.data, positions, indices, self.flip_seed, self.bad)
        if fill:
            reading.fill(0, self.share)
        return reading

    def _submit(self, workers: Workers, reading: _Reading, stop: Event) -> _Pending:
        """Rows are cut evenly over the threads."""
        cuts = [self.share * i // self.workers for i in range(self.workers + 1)]
        parts = [
            workers.submit(lambda job, a=a, b=b: reading.fill(a, b, stop, job))  # type: ignore[misc]
            for a, b in pairwise(cuts)
            if a < b
        ]
        return _Pending(reading, parts, self.timeout)
