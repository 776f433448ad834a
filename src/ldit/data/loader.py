"""Batches by step, read ahead by threads (Pillow and numpy release Python's lock while they work)."""

from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from threading import Event

import numpy as np
import torch

from ldit.config.sections import BadImages, DataConfig
from ldit.data.batch import Batch, Fault
from ldit.data.buckets import Bucketed, BucketOrder
from ldit.data.order import EpochOrder
from ldit.data.samples import Samples
from ldit.data.workers import Job, Stuck, Workers
from ldit.errors import DataError, RunError
from ldit.rng import generator, uniform

AHEAD = 2  # batches that are read while the consumer works on one


def load_batch(
    data: Samples,
    positions: Sequence[int],
    indices: Sequence[int],
    flip_seed: int | None,
    bad: BadImages = "stop",
) -> Batch:
    """The batch of samples `indices`. With `flip_seed` half of the samples are mirrored; the random number of each
    sample's position decides.

    With `bad` "stop" DataError names the first bad sample; with "skip" the batch lists bad samples in `faults`. Errors
    that are the machine's fault (RunError) are raised with either.
    """
    reading = _Reading(data, positions, indices, flip_seed, bad)
    reading.fill(0, len(indices))
    return reading.batch()


class _Reading:
    """A batch while it is read: several threads fill its rows, each its own range of rows."""

    def __init__(
        self,
        data: Samples,
        positions: Sequence[int],
        indices: Sequence[int],
        flip_seed: int | None,
        bad: BadImages,
        step: int = 0,
        seed: int = 0,
        shape: tuple[int, int, int] | None = None,
    ) -> None:
        # A shape of its own has a batch of a bucket.
        self.in_bucket = shape is not None

        self.data, self.positions, self.indices, self.step = data, positions, indices, step
        self.flip_seed, self.bad, self.seed = flip_seed, bad, seed
        self.inputs = torch.empty(len(indices), *(shape or data.shape))
        self.labels = torch.empty(len(indices), dtype=torch.int64)
        self.faults: dict[int, str] = {}

    def fill(self, first: int, last: int, stop: Event | None = None, job: Job | None = None) -> None:
        """Fill rows first … last-1; return early, between two samples, once `stop` is set. `job` is told each row that
        begins, so that a read that hangs can be named."""
        inputs, labels = self.inputs.numpy(), self.labels.numpy()
        for row in range(first, last):
            if stop is not None and stop.is_set():
                return
            if job is not None:
                job.at(row)
            # The position decides, so flips do not depend on threads, ranks or batch size.
            position, flip = self.positions[row], False
            if self.flip_seed is not None:
                flip = uniform(self.flip_seed, "flip", 0, position) < 0.5
            try:
                labels[row] = self._read(row, flip, inputs[row])
            except DataError as error:
                if self.bad == "stop":
                    hint = "--data.bad skip leaves bad images out"
                    if self.data.root.exists():  # not a data set object
                        hint = f"ldit data check lists them, {hint}"
                    raise DataError(f"{error} ({hint})") from (error.__cause__ or error)
                inputs[row], labels[row] = 0, 0
                self.faults[row] = str(error)

    def _read(self, row: int, flip: bool, out: np.ndarray) -> int:
        if not (self.in_bucket and isinstance(self.data, Bucketed)):
            return self.data.read(self.indices[row], flip, out)
        # Like flips, the place of a crop is decided by the position.
        generated = generator(self.seed, "crop", 0, self.positions[row])
        u, v = torch.rand(2, generator=generated, dtype=torch.float64).tolist()
        return self.data.read(self.indices[row], flip, out, (u, v))

    def batch(self) -> Batch:
        faults = tuple(
            Fault(self.positions[row], self.data.where(self.indices[row]), self.faults[row])
            for row in sorted(self.faults)
        )
        return Batch(self.inputs, self.labels, tuple(self.positions), faults, self.step)


@dataclass(frozen=True)
class _Pending:
    reading: _Reading
    parts: list[Job]
    timeout: float

    def batch(self) -> Batch:
        """Wait until all rows are read. Of several errors that of the first row is raised, for any number of threads.
        RunError names a thread and a sample that take longer than `timeout` seconds."""
        for part in self.parts:
            try:
                part.finish(self.timeout)
            except Stuck as stuck:
                data = self.reading.data
                where = data.where(self.reading.indices[stuck.item])
                raise RunError(f"{data.root}: {where} cannot be read: {stuck} (data.timeout)") from None
        return self.reading.batch()


class Loader:
    """One process's share of the batches of a run. Step s has the same global batch at every call and on every process.

    The positions of a global batch of `batch_size` samples are cut into `parts` equal ranges; this loader reads range
    `part`. `workers` threads read the rows of a batch together, up to AHEAD batches in advance; with 0 the caller's
    thread reads. The batches are the same for any number. ValueError when `parts` does not divide the batch.
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
        self.order: EpochOrder | BucketOrder
        self.order = data.order(batch_size, seed) if isinstance(data, Bucketed) else EpochOrder(len(data), seed)
        self.seed, self.flip_seed = seed, seed if flip else None
        self.bad, self.timeout = bad, timeout

    def from_step(self, first: int, last: int, offset: int = 0) -> Generator[Batch, None, None]:
        """This process's share of steps first … last-1, in order. Step s of all processes together takes the positions
        offset + s·batch_size … offset + (s+1)·batch_size - 1 of the stream.

        An error is raised at the step that contains the sample, although it was read in advance. `close()` ends the
        threads as soon as each has read its current sample; a consumer that may fail between two batches should use
        `contextlib.closing`.
        """
        steps = range(first, last)
        if not self.workers:
            return (self._reading(step, offset, fill=True).batch() for step in steps)
        return self._ahead(steps, offset)

    def _ahead(self, steps: range, offset: int) -> Generator[Batch, None, None]:
        """The batches of `steps`, read by threads."""
        upcoming, stop = iter(steps), Event()
        pending: deque[_Pending] = deque()
        workers, patience = Workers(self.workers, "loader"), self.timeout
        try:
            while True:
                # Keep AHEAD batches in work in addition to the one that is yielded next.
                while len(pending) <= AHEAD and (step := next(upcoming, None)) is not None:
                    pending.append(self._submit(workers, self._reading(step, offset), stop))
                if not pending:
                    return
                yield pending.popleft().batch()
        except RunError:
            patience = 0.0  # do not wait for the threads: one hangs, or a read failed and others may hang
            raise
        finally:
            stop.set()
            workers.close(patience)

    def _reading(self, step: int, offset: int, fill: bool = False) -> _Reading:
        """The batch of this process at `step`, with its rows read if `fill`."""
        start = offset + step * self.batch_size + self.part * self.share
        positions = range(start, start + self.share)
        indices = self.order.between(positions.start, positions.stop)
        shape = None
        if isinstance(self.data, Bucketed) and isinstance(self.order, BucketOrder):
            shape = self.data.shape_of(self.order.bucket_at(positions.start))
        reading = _Reading(self.data, positions, indices, self.flip_seed, self.bad, step, self.seed, shape)
        if fill:
            reading.fill(0, self.share)
        return reading

    def _submit(self, workers: Workers, reading: _Reading, stop: Event) -> _Pending:
        """Give each thread an equal share of the rows."""
        cuts = [self.share * i // self.workers for i in range(self.workers + 1)]
        parts = [
            workers.submit(lambda job, a=a, b=b: reading.fill(a, b, stop, job))  # type: ignore[misc]
            for a, b in pairwise(cuts)
            if a < b
        ]
        return _Pending(reading, parts, self.timeout)
