"""One global batch, or a slice of it."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """images (B, 3, H, W) fp32 in [-1, 1], labels (B,), and each sample's position in the stream, which seeds it."""

    images: Tensor
    labels: Tensor
    positions: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.positions)

    def micro(self, size: int) -> Iterator["Batch"]:
        """Consecutive slices of `size` samples."""
        for i in range(0, len(self), size):
            part = slice(i, i + size)
            yield Batch(self.images[part], self.labels[part], self.positions[part])
