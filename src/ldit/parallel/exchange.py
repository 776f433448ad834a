"""Gathers whole tensors from the parts that a group holds, one for each process, and scatters them back.

So work on whole tensors (Muon's iterations, writing files) is shared, and no process holds more than one at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ldit.parallel.layout import Layout, view


@dataclass(frozen=True)
class ModelGroup:
    """The processes that together hold one whole model: `members` are their (shard, tp), `me` the index of this one."""

    members: tuple[tuple[int, int], ...] = ((0, 0),)
    me: int = 0
    group: dist.ProcessGroup | None = None

    def __len__(self) -> int:
        return len(self.members)

    @property
    def here(self) -> tuple[int, int]:
        """(shard, tp) of this process."""
        return self.members[self.me]


def gather_whole(
    parts: Sequence[Tensor | None], layouts: Sequence[Layout | None], model_group: ModelGroup
) -> Tensor | None:
    """Give member j of the group the whole tensor j, by one all-to-all; returns this process's tensor.

    `parts[j]` is this process's part of tensor j, `layouts[j]` its layout, the same on all. None: no tensor for j. All
    parts must have one dtype and device.
    """
    if len(model_group) == 1:
        return parts[0]
    # Send to member j this process's part of tensor j, flat; of equal copies only one is sent.
    outgoing = [
        part.reshape(-1) if part is not None and layout is not None and layout.sent_by(*model_group.here) else None
        for part, layout in zip(parts, layouts, strict=True)
    ]
    own = layouts[model_group.me]
    sizes = [_count(own, *member) if own is not None and own.sent_by(*member) else 0 for member in model_group.members]
    received = _all_to_all(outgoing, sizes, next(part for part in parts if part is not None), model_group)
    if own is None:
        return None
    # Put each member's part where it belongs in this process's own tensor.
    whole = received.new_empty(own.shape)
    for member, piece in zip(model_group.members, received.split(sizes), strict=True):
        if own.sent_by(*member) and piece.numel():
            view(whole, own.part(*member)).copy_(piece.view(own.part_shape(*member)))
    return whole


def scatter_parts(
    whole: Tensor | None, layouts: Sequence[Layout | None], model_group: ModelGroup, like: Tensor
) -> list[Tensor | None]:
    """The reverse of `gather_whole`: member j sends every process its part of the whole tensor j.

    Returns this process's part of each tensor, with the dtype and device of `like`.
    """
    if len(model_group) == 1:
        return [whole]
    # Cut this process's own tensor into a part for each member.
    own = layouts[model_group.me]
    outgoing: list[Tensor | None] = [None] * len(model_group)
    if own is not None and whole is not None:
        outgoing = [view(whole, own.part(*member)).reshape(-1) for member in model_group.members]
    # Receive one part from each member.
    sizes = [_count(layout, *model_group.here) if layout is not None else 0 for layout in layouts]
    received = _all_to_all(outgoing, sizes, like, model_group)
    return [
        piece.view(layout.part_shape(*model_group.here)) if layout is not None else None
        for piece, layout in zip(received.split(sizes), layouts, strict=True)
    ]


def _count(layout: Layout, shard: int, tp: int) -> int:
    return torch.Size(layout.part_shape(shard, tp)).numel()


def _all_to_all(outgoing: Sequence[Tensor | None], sizes: list[int], like: Tensor, model_group: ModelGroup) -> Tensor:
    """Send `outgoing[j]` to member j. Returns what this process got, flat: `sizes[j]` numbers from member j."""
    flat = [part for part in outgoing if part is not None]
    sent = torch.cat(flat) if flat else like.new_empty(0)
    received = like.new_empty(sum(sizes))
    counts = [0 if part is None else part.numel() for part in outgoing]
    dist.all_to_all_single(received, sent, sizes, counts, group=model_group.group)
    return received
