"""Blocks with joined matrix products: queries, keys and values in one, the two halves of SwiGLU in one.

Files and the trained module keep the published names. Weights are joined in memory, a block at a time, and the module's
own weights become views of the joined ones. So the module still works, and no weight is held twice.
"""

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldit.nn.dit import Block
from ldit.nn.layers import Attention, SwiGLU

Product = Callable[[nn.Linear], nn.Module]
"""Replaces a Linear of a block by another module that computes its product."""

_Module = TypeVar("_Module", bound=nn.Module)


def packed_block(block: Block, product: Product = lambda linear: linear) -> Block:
    """A copy of the block with joined products, each passed through `product`."""
    twin = shell(block)
    twin.attention = PackedAttention(block.attention, product)
    twin.feed_forward = PackedSwiGLU(block.feed_forward, product)
    return twin


def is_packable(block: Block) -> bool:
    """Whether block, attention and FFN are the package's own, made of plain products: others may compute something
    else."""
    if type(block) is not Block or type(block.attention) is not Attention or type(block.feed_forward) is not SwiGLU:
        return False
    a, f = block.attention, block.feed_forward
    return all(type(product) is nn.Linear for product in (a.wq, a.wk, a.wv, a.wo, f.w1, f.w2, f.w3))


def shell(module: _Module) -> _Module:
    """A shallow copy: it shares the parameters, and its children can be replaced."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


def joined(linears: Sequence[nn.Linear]) -> nn.Linear:
    """One Linear without bias whose output is theirs side by side; their weights become views of its weight."""
    parts = [linear.weight.data for linear in linears]
    rows, width = [len(part) for part in parts], parts[0].shape[1]
    # Weights that are neighbours in memory need no copy: joined before, or mapped from a file that stores them so.
    if _are_adjacent(parts):
        weight = parts[0].as_strided((sum(rows), width), (width, 1))
    else:
        weight = torch.cat(parts)
        for linear, part in zip(linears, weight.split(rows), strict=True):
            linear.weight.data = part
    result = nn.Linear(width, sum(rows), bias=False, device="meta")
    result.weight = nn.Parameter(weight, requires_grad=False)
    return result


def _are_adjacent(parts: Sequence[Tensor]) -> bool:
    """Whether the parts follow each other in one piece of memory."""
    return all(part.is_contiguous() for part in parts) and all(
        a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
        and a.storage_offset() + a.numel() == b.storage_offset()
        for a, b in pairwise(parts)
    )


class PackedAttention(Attention):
    """Attention with one product for queries, keys and values."""

    def __init__(self, attention: Attention, product: Product) -> None:
        nn.Module.__init__(self)
        self.heads, self.kv_heads, self.head_dim = attention.heads, attention.kv_heads, attention.head_dim
        self.norm_heads = attention.norm_heads
        self.q_norm, self.k_norm, self.value_mix = attention.q_norm, attention.k_norm, attention.value_mix
        self.wqkv = product(joined([attention.wq, attention.wk, attention.wv]))
        self.wo = product(attention.wo)  # type: ignore[assignment]

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kv = self.kv_heads * self.head_dim
        return self.wqkv(x).split((self.heads * self.head_dim, kv, kv), dim=-1)


class PackedSwiGLU(SwiGLU):
    """SwiGLU with one product for w1 and w3. For sampling only: it works in place, without gradients."""

    def __init__(self, feed_forward: SwiGLU, product: Product) -> None:
        nn.Module.__init__(self)
        self.w13 = product(joined([feed_forward.w1, feed_forward.w3]))
        self.w2 = product(feed_forward.w2)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w13(x).chunk(2, dim=-1)
        return self.w2(F.silu(gate).mul_(value))
