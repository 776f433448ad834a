"""Batches by step, read ahead by threads (Pillow and numpy release the interpreter while they work)."""

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from threading import Event

import numpy as np
import torch

from ldit.data.batch import Batch
from ldit.data.order import EpochOrder
from ldit.data.picture_set import PictureSet
from ldit.rng import uniform

AHEAD = 2  # batches in the making while the consumer works on one


def load_batch(data: PictureSet, positions: Sequence[int], indices: Sequence[int], flip_seed: int | None) -> Batch:
    """The samples `indices`; with `flip_seed`, half of them mirrored, each by its own position's random number.

    DataError names the first picture that cannot be read.
    """
    reading = _Reading(data, positions, indices, flip_seed)
    reading.fill(0, len(indices))
    return reading.batch()


class _Reading:
    """A batch whose rows are filled from several threads, each its own rows."""

    def __init__(
        self, data: PictureSet, positions: Sequence[int], indices: Sequence[int], flip_seed: int | None
    ) -> None:
        self.data, self.positions, self.indices, self.flip_seed = data, positions, indices, flip_seed
        self.images = torch.empty(len(indices), 3, data.size, data.size)
        self.labels = torch.empty(len(indices), dtype=torch.int64)

    def fill(self, first: int, last: int, stop: Event | None = None) -> None:
        """Rows first … last-1; leaves off between two pictures once `stop` is set."""
        images, labels = self.images.numpy(), self.labels.numpy()
        for row in range(first, last):
            if stop is not None and stop.is_set():
                return
            picture, labels[row] = self.data[self.indices[row]]
            if self.flip_seed is not None and uniform(self.flip_seed, "flip", 0, self.positions[row]) < 0.5:
                picture = picture[:, ::-1]
            np.divide(picture.transpose(2, 0, 1), np.float32(127.5), out=images[row])
            images[row] -= 1

    def batch(self) -> Batch:
        return Batch(self.images, self.labels, tuple(self.positions))


@dataclass(frozen=True)
class _Pending:
    reading: _Reading
    parts: list[Future[None]]

    def batch(self) -> Batch:
        """Waits. Of several faults the first row's is raised, whatever the number of threads."""
        for part in self.parts:
            part.result()
        return self.reading.batch()


class Loader:
    """One process's share of the batches of a run; step s is the same batch whoever asks for it and whenever.

    The global batch of `batch_size` samples is cut into `parts` equal runs of positions; this loader gives run `part`.
    `workers` threads share the reading of a batch and work AHEAD batches in advance; 0 reads when asked, on no thread.
    The bits do not depend on it. ValueError when `parts` does not divide the batch.
    """

    def __init__(
        self,
        data: PictureSet,
        batch_size: int,
        seed: int,
        flip: bool,
        workers: int = 2,
        part: int = 0,
        parts: int = 1,
    ) -> None:
        if parts < 1 or batch_size % parts or not 0 <= part < parts:
            raise ValueError(f"a batch of {batch_size} has no part {part} of {parts}")
        self.data, self.batch_size, self.workers = data, batch_size, workers
        self.part, self.share = part, batch_size // parts
        self.order = EpochOrder(len(data), seed)
        self.flip_seed = seed if flip else None

    def from_step(self, first: int, last: int, offset: int = 0) -> Generator[Batch, None, None]:
        """The share of steps first … last-1, in order; step s of all processes together takes positions
        offset + s·batch_size … of the stream. Positions of a Batch are those of the stream.

        A DataError comes at the step of the picture it names. `close()` ends the threads as soon as each has read the
        picture it is at; a consumer that may fail between two batches should use `contextlib.closing`.
        """
        steps = range(first, last)
        if not self.workers:
            return (load_batch(*self._samples(step, offset)) for step in steps)
        return self._ahead(steps, offset)

    def _ahead(self, steps: range, offset: int) -> Generator[Batch, None, None]:
        upcoming, stop = iter(steps), Event()
        pending: deque[_Pending] = deque()
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="loader")
        try:
            while True:
                while len(pending) <= AHEAD and (step := next(upcoming, None)) is not None:
                    pending.append(self._submit(pool, _Reading(*self._samples(step, offset)), stop))
                if not pending:
                    return
                yield pending.popleft().batch()
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)

    def _samples(self, step: int, offset: int) -> tuple[PictureSet, Sequence[int], Sequence[int], int | None]:
        start = offset + step * self.batch_size + self.part * self.share
        positions = range(start, start + self.share)
        return self.data, positions, self.order.between(positions.start, positions.stop), self.flip_seed

    def _submit(self, pool: ThreadPoolExecutor, reading: _Reading, stop: Event) -> _Pending:
        """Rows are cut evenly over the threads; none is left without rows unless there are fewer rows."""
        cuts = [self.share * i // self.workers for i in range(self.workers + 1)]
        parts = [pool.submit(reading.fill, a, b, stop) for a, b in pairwise(cuts) if a < b]
        return _Pending(reading, parts)
