"""Tensor parallelism: the matrices of every layer cut over the processes of a group (Shoeybi et al. 2019).

| parameter                                             | cut along                   | forward        | backward     |
|-------------------------------------------------------|-----------------------------|----------------|--------------|
| wq wk wv w1 w3 (wk_y wv_y)                            | output rows                 |                | sum of dx    |
| wo w2                                                 | input columns               | sum            |              |
| q_norm k_norm (ky_norm), full width; gate of the text | their width                 | sum of moments | sum          |
| value_mix                                             | its heads                   |                | as above     |
| q_norm k_norm per head                                | not cut                     |                | sum          |
| adaLN                                                 | output rows, gathered after | gather         | sum of dcond |
| everything else                                       | not cut, same on each       |                |              |
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ldit.errors import ConfigError
from ldit.nn.dit import Block, DiT
from ldit.nn.layers import Attention, RMSNorm

_ROWS = ("attention.wq", "attention.wk", "attention.wv", "attention.wk_y", "attention.wv_y",
         "feed_forward.w1", "feed_forward.w3", "adaLN_modulation.1")  # fmt: skip
_COLUMNS = ("attention.wo", "feed_forward.w2")
Group = dist.ProcessGroup


def _sum(x: Tensor, group: Group) -> Tensor:
    y = x.contiguous().clone()
    dist.all_reduce(y, group=group)
    return y


class _Enter(torch.autograd.Function):
    """Where a tensor enters cut layers. Forward: unchanged. Backward: the sum of the gradients of all processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _sum(grads[0], ctx.group), None


class _Leave(torch.autograd.Function):
    """Where a tensor leaves cut layers. Forward: the sum of the partial results. Backward: unchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return _sum(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


class _Share(torch.autograd.Function):
    """Forward: a sum over processes. Backward: also a sum, because each process uses the result for its own part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _sum(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _sum(grads[0], ctx.group), None


class _Gather(torch.autograd.Function):
    """Forward: the parts of the last axis, concatenated. Backward: this process's own part of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.index, ctx.size = dist.get_rank(group), dist.get_world_size(group)
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(ctx.size)]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0].chunk(ctx.size, dim=-1)[ctx.index], None


class ShardedLayerNorm(nn.Module):
    """LayerNorm over the full projected width, of which this process holds a part.

    Mean and variance are those of the full width, in fp32. The mean is summed first and the variance about it second,
    as a difference of large squares would lose digits.
    """

    def __init__(self, norm: nn.LayerNorm, group: Group) -> None:
        super().__init__()
        self.eps, self.group, self.parts = norm.eps, group, dist.get_world_size(group)
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()  # (B, T, width / parts)
        mean = _Share.apply(x32.mean(-1, keepdim=True), self.group) / self.parts
        off = x32 - mean
        variance = _Share.apply(off.square().mean(-1, keepdim=True), self.group) / self.parts
        return (off * (variance + self.eps).rsqrt() * self.weight.float() + self.bias.float()).type_as(x)


class SharedRMSNorm(RMSNorm):
    """RMSNorm of each head, with one weight for the heads of all processes: its gradient is summed over them."""

    def __init__(self, norm: RMSNorm, group: Group) -> None:
        super().__init__(norm.weight.shape[0], norm.eps)
        self.weight, self.group = norm.weight, group

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, _Enter.apply(self.weight, self.group), self.eps)


def cut_layers(model: DiT, group: Group) -> dict[str, int]:
    """Cut every block of `model` (on the meta device) for this group; returns name -> axis of the cut parameters.

    ConfigError unless the size of the group divides heads and widths.
    """
    parts = dist.get_world_size(group)
    config = model.config
    for name, value in (
        ("n_heads", config.n_heads),
        ("n_kv_heads", config.kv_heads),
        ("ffn hidden", config.ffn_hidden),
    ):
        if value % parts:
            raise ConfigError(f"parallel.tp: {parts} does not divide the model's {name} {value}")
    axes: dict[str, int] = {}
    for index, block in enumerate(model.layers):
        assert isinstance(block, Block)
        for name, axis in _cut_block(block, group, parts).items():
            axes[f"layers.{index}.{name}"] = axis
    return axes


def _cut_block(block: Block, group: Group, parts: int) -> dict[str, int]:
    # This process has its share of the heads.
    attention = block.attention
    attention.heads //= parts
    attention.kv_heads //= parts
    # Cut the parameters, each along the axis of the table above.
    axes = {}
    for name, module in list(block.named_modules()):
        if name in _ROWS or name in _COLUMNS:
            assert isinstance(module, nn.Linear)
            for leaf, _ in list(module.named_parameters()):
                axes[f"{name}.{leaf}"] = int(name in _COLUMNS)
        elif isinstance(module, nn.LayerNorm):  # q_norm, k_norm, ky_norm
            axes.update({f"{name}.weight": 0, f"{name}.bias": 0})
    if hasattr(attention, "gate"):
        axes["attention.gate"] = 0
    if attention.value_mix is not None:
        axes["attention.value_mix"] = 1
    for name, axis in axes.items():
        _shrink(block, name, axis, parts)
    _swap_norms(attention, group)
    # Communicate by hooks: sums where tensors enter and leave cut layers, a gather after adaLN.
    attention.register_forward_pre_hook(_entering(group))
    block.feed_forward.register_forward_pre_hook(_entering(group))
    for linear in (attention.wo, block.feed_forward.w2):
        linear.register_forward_hook(lambda module, args, out: _Leave.apply(out, group))
    if block.adaLN_modulation is not None:
        block.adaLN_modulation.register_forward_pre_hook(_entering(group))
        block.adaLN_modulation.register_forward_hook(lambda module, args, out: _Gather.apply(out, group))
    return axes


def _swap_norms(attention: Attention, group: Group) -> None:
    for name in ("q_norm", "k_norm", "ky_norm"):
        norm = getattr(attention, name, None)
        if isinstance(norm, nn.LayerNorm):
            setattr(attention, name, ShardedLayerNorm(norm, group))
        elif isinstance(norm, RMSNorm):
            setattr(attention, name, SharedRMSNorm(norm, group))


def _entering(group: Group) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    """A hook for the arguments (x, rope, context, mask): x and the features of the text enter cut layers."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(
            _Enter.apply(value, group) if place in (0, 2) and value is not None else value
            for place, value in enumerate(args)
        )

    return hook


def _shrink(block: nn.Module, name: str, axis: int, parts: int) -> None:
    """Replace a parameter by one of a `parts`-th of its size along `axis`, uninitialised."""
    owner_name, _, leaf = name.rpartition(".")
    owner = block.get_submodule(owner_name)
    old: Tensor = getattr(owner, leaf)
    shape = list(old.shape)
    shape[axis] //= parts
    setattr(owner, leaf, nn.Parameter(old.new_empty(shape)))
    if isinstance(owner, nn.Linear):
        owner.out_features, owner.in_features = owner.weight.shape
