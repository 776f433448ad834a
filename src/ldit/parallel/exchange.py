"""Whole tensors out of the parts of a group, and back: each process gets one, so that work on whole tensors (Muon's
iterations, writing files) is shared and none holds more than its own."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ldit.parallel.layout import Layout, view


@dataclass(frozen=True)
class ModelGroup:
    """The processes that hold one whole model among them: (shard, tp) of each, and which of them this one is."""

    members: tuple[tuple[int, int], ...] = ((0, 0),)
    me: int = 0
    group: dist.ProcessGroup | None = None

    def __len__(self) -> int:
        return len(self.members)

    @property
    def here(self) -> tuple[int, int]:
        return self.members[self.me]


def collect(parts: Sequence[Tensor | None], layouts: Sequence[Layout | None], model_group: ModelGroup) -> Tensor | None:
    """Member j gets tensor j whole. `parts[j]` is this process's part of it, `layouts[j]` its layout; None = nothing
    for j, the same on all. All of one dtype and device. One all-to-all."""
    if len(model_group) == 1:
        return parts[0]
    outgoing = [
        part.reshape(-1) if part is not None and layout is not None and layout.sent_by(*model_group.here) else None
        for part, layout in zip(parts, layouts, strict=True)
    ]
    own = layouts[model_group.me]
    sizes = [_count(own, *member) if own is not None and own.sent_by(*member) else 0 for member in model_group.members]
    received = _all_to_all(outgoing, sizes, next(part for part in parts if part is not None), model_group)
    if own is None:
        return None
    whole = received.new_empty(own.shape)
    for member, piece in zip(model_group.members, received.split(sizes), strict=True):
        if own.sent_by(*member) and piece.numel():
            view(whole, own.part(*member)).copy_(piece.view(own.part_shape(*member)))
    return whole


def spread(
    whole: Tensor | None, layouts: Sequence[Layout | None], model_group: ModelGroup, like: Tensor
) -> list[Tensor | None]:
    """The reverse of `collect`: member j gives everyone its part of tensor j. Returns this process's part of each."""
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
    flat = [part for part in outgoing if part is not None]
    sent = torch.cat(flat) if flat else like.new_empty(0)
    received = like.new_empty(sum(sizes))
    counts = [0 if part is None else part.numel() for part in outgoing]
    dist.all_to_all_single(received, sent, sizes, counts, group=model_group.group)
    return received
