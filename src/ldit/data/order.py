"""Stateless sample order: which sample stands at a position of the endless stream of epochs."""

from collections.abc import Sequence

import torch


class EpochOrder:
    """Epoch e is a fresh shuffle of 0..size-1 seeded by seed + e; the stream is the epochs one after another.

    Global step b (from 0) takes positions b·batch … (b+1)·batch-1, whatever the world size. Memory: one epoch.
    """

    def __init__(self, size: int, seed: int) -> None:
        if size < 1:
            raise ValueError("an order needs at least one sample")
        self.size, self.seed = size, seed
        self._epoch = -1
        self._permutation: list[int] = []

    def __getitem__(self, position: int) -> int:
        """Sample index at `position` of the stream."""
        epoch, offset = divmod(position, self.size)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self._permutation = torch.randperm(self.size, generator=generator).tolist()
            self._epoch = epoch
        return self._permutation[offset]

    def batch(self, step: int, size: int) -> tuple[Sequence[int], Sequence[int]]:
        """(positions, sample indices) of global step `step`."""
        positions = range(step * size, (step + 1) * size)
        return positions, [self[position] for position in positions]
