"""Whole tensors gathered from the parts that a group holds, and scattered back: one tensor for each process.

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
    """The processes that together hold one whole model: (shard, tp) of each, and which of them this one is."""

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
    """Member j gets tensor j whole. `parts[j]` is this process's part of it, `layouts[j]` its layout; None = nothing
    for j, the same on all. All of one dtype and device. One all-to-all."""
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
    """The reverse of `gather_whole`: member j, which holds tensor j whole, gives every process its part. Returns this
    process's part of each tensor."""
    if len(model_group) == 1:
        return [whole]
    own = layouts[model_group.me]
    outgoing: list[Tensor | None] = [None] * len(model_group)
    if own is not None and whole is not None:
        outgoing = [view(whole, own.part(*member)).reshape(-1) for member in model_group.members]
    sizes = [_count(layout, *model_group.here) if layout is not None else 0 for layout in layouts]
    received = _all_to_all(outgoing, sizes, like, model_group)
    return [
        piece.view(layout.part_shape(*model_group.here)) if layout is not None else None
        for piece, layout in zip(received.split(sizes), layouts, strict=True)
    ]


def _count(layout: Layout, shard: int, tp: int) -> int:
    return torch.Size(layout.part_shape(shard, tp)).numel()


def _all_to_all(outgoing: Sequence[Tensor | None], sizes: list[int], like: Tensor, model_group: ModelGroup) -> Tensor:
    """What the others sent to this process, `sizes` numbers from each, flat; `outgoing[j]` goes to member j."""
    flat = [part for part in outgoing if part is not None]
    sent = torch.cat(flat) if flat else like.new_empty(0)
    received = like.new_empty(sum(sizes))
    counts = [0 if part is None else part.numel() for part in outgoing]
    dist.all_to_all_single(received, sent, sizes, counts, group=model_group.group)
    return received
