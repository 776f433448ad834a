"""Stateless sample order: which sample is at a position of the endless stream of epochs."""

from collections.abc import Sequence

import numpy as np
import torch


class EpochOrder:
    """Epoch e is a shuffle of 0 … size-1 seeded by seed + e; the stream is one epoch after another.

    Memory: the shuffle of one epoch, 4 bytes a sample.
    """

    def __init__(self, size: int, seed: int) -> None:
        if size < 1:
            raise ValueError("an order needs at least one sample")
        self.size, self.seed = size, seed
        self._epoch = -1
        self._permutation = np.empty(0, np.int32)

    def __getitem__(self, position: int) -> int:
        """Sample index at `position` of the stream."""
        epoch, offset = divmod(position, self.size)
        return int(self._shuffled(epoch)[offset])

    def between(self, first: int, last: int) -> list[int]:
        """Sample indices at positions first … last-1, over as many epochs as they touch."""
        indices: list[int] = []
        while first < last:
            epoch, offset = divmod(first, self.size)
            part = self._shuffled(epoch)[offset : offset + last - first]
            indices += part.tolist()
            first += len(part)
        return indices

    def batch(self, step: int, size: int) -> tuple[Sequence[int], Sequence[int]]:
        """(positions, sample indices) of global step `step`, from 0: positions step·size … (step+1)·size-1."""
        positions = range(step * size, (step + 1) * size)
        return positions, self.between(positions.start, positions.stop)

    def _shuffled(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            # int32 gives the same shuffle as int64, in half the memory.
            dtype = torch.int32 if self.size < 1 << 31 else torch.int64
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self._permutation = torch.randperm(self.size, generator=generator, dtype=dtype).numpy()
            self._epoch = epoch
        return self._permutation
