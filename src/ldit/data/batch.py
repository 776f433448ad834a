"""A batch: inputs, labels, positions in the stream, and which samples could not be read."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Fault:
    """A sample that could not be read: its position in the stream, its name, and why."""

    position: int
    where: str
    reason: str


@dataclass(frozen=True)
class Batch:
    """inputs (B, C, H, W) fp32: images in [-1, 1], or means and log-variances of cached latents. labels (B,) int64.
    `positions` in the stream of samples seed the noise of each. The inputs of `faults` are zeros, and have no loss."""

    inputs: Tensor
    labels: Tensor
    positions: tuple[int, ...]
    faults: tuple[Fault, ...] = ()
    step: int = 0
    """The number of the step that takes it, counted from 0; a rollback repeats numbers with other positions."""

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def sound(self) -> tuple[bool, ...]:
        """Whether each sample could be read."""
        bad = {fault.position for fault in self.faults}
        return tuple(position not in bad for position in self.positions)

    def readable(self) -> "Batch":
        """The batch without the samples that could not be read."""
        rows = [row for row, sound in enumerate(self.sound) if sound]
        return Batch(self.inputs[rows], self.labels[rows], tuple(self.positions[row] for row in rows), step=self.step)

    def micro(self, size: int) -> Iterator["Batch"]:
        """Consecutive slices of `size` samples."""
        for i in range(0, len(self), size):
            part = slice(i, i + size)
            positions = self.positions[part]
            faults = tuple(fault for fault in self.faults if fault.position in positions)
            yield Batch(self.inputs[part], self.labels[part], positions, faults, self.step)
