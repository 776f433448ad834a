"""Which part of a full tensor each process holds, computed without communication."""

from dataclasses import dataclass

from torch import Tensor

Part = tuple[slice, ...]


@dataclass(frozen=True)
class Layout:
    """How a full tensor of `shape` is cut.

    Tensor parallelism cuts axis `tp_axis` into `tp` equal parts; None = every tensor-parallel process has all of it.
    Then FSDP cuts axis 0 of each part into `shard` chunks like torch.chunk: equal ones, but the last may be short or
    empty.
    """

    shape: tuple[int, ...]
    tp_axis: int | None = None
    tp: int = 1
    shard: int = 1

    def part(self, shard: int = 0, tp: int = 0) -> Part:
        """The part of the process at these indices, as slices of the full tensor."""
        bounds = [(0, size) for size in self.shape]
        # First the cut of tensor parallelism, then FSDP's along axis 0 of the result.
        if self.tp_axis is not None:
            size = self.shape[self.tp_axis] // self.tp
            bounds[self.tp_axis] = (tp * size, (tp + 1) * size)
        if bounds:
            low, high = bounds[0]
            chunk = -(-(high - low) // self.shard)
            bounds[0] = (min(low + shard * chunk, high), min(low + (shard + 1) * chunk, high))
        return tuple(slice(low, high) for low, high in bounds)

    def part_shape(self, shard: int = 0, tp: int = 0) -> tuple[int, ...]:
        """The shape of `part`."""
        return tuple(s.stop - s.start for s in self.part(shard, tp))

    @property
    def copies(self) -> int:
        """How many processes of a model group hold the same part."""
        return self.tp if self.tp_axis is None else 1

    def sent_by(self, shard: int, tp: int) -> bool:
        """Whether the process at these indices sends its part; of equal copies only the first is sent."""
        return self.tp_axis is not None or tp == 0


def view(full: Tensor, part: Part) -> Tensor:
    """A view of this part of a full tensor."""
    return full[part] if part else full
