"""Applies parallelism to a network: tensor parallelism, activation checkpointing, compilation, FSDP2.

Always in this order, on the meta device.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.compiler.config
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ldit.config.sections import ParallelConfig
from ldit.nn.dit import DiT
from ldit.nn.kernels import has_triton
from ldit.nn.layers import Transformer
from ldit.parallel.layout import Layout
from ldit.parallel.world import REPLICATE, SHARD, World

MOST_GRAPHS = 32  # of compiled blocks: one for each form of block, image size, and with or without gradients
_OPS = torch.ops.aten
# "selective" saves the expensive operations, matmuls and attention, and recomputes the rest.
_KEPT = frozenset(
    {
        _OPS.mm.default,
        _OPS.addmm.default,
        _OPS._scaled_dot_product_flash_attention.default,
        _OPS._scaled_dot_product_efficient_attention.default,
        _OPS._scaled_dot_product_cudnn_attention.default,
        _OPS._scaled_dot_product_flash_attention_for_cpu.default,
        _OPS._scaled_dot_product_fused_attention_overrideable.default,
    }
)


def parallelise(
    model: nn.Module, config: ParallelConfig, world: World, compute: torch.dtype, reduce: torch.dtype
) -> dict[str, Layout]:
    """Change `model` in place; returns the layout of every parameter by name, in the order of the network.

    `compute` and `reduce` are the dtypes of FSDP's computation and gradient sums. Networks without blocks, such as
    autoencoders, are one FSDP unit. Only Large-DiT is cut by tensor parallelism.
    """
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    # Tensor parallelism: each process keeps its part of every matrix.
    group = world.tp_group
    axes: dict[str, int] = {}
    if isinstance(model, DiT) and group is not None:
        from ldit.parallel.tensor import cut_layers

        axes = cut_layers(model, group)
    blocks = _blocks(model)
    # Activation checkpointing, block by block.
    if config.recompute != "none":
        for block in blocks:
            block.forward = _recomputed(block.forward, config.recompute)
    # Compilation, of one block at a time: all blocks share one graph, which compiles in seconds.
    if config.compile or (has_triton(world.device) and not config.eager):
        torch.compiler.config.recompile_limit = max(torch.compiler.config.recompile_limit, MOST_GRAPHS)
        for block in blocks:
            block.forward = torch.compile(block.forward, dynamic=False)
    # FSDP2, around everything before.
    sharded = world.data_parts > 1
    if sharded:
        _shard(model, config, world, compute, reduce)
    return {
        name: Layout(shape, axes.get(name), world.tp, world.shard if sharded else 1) for name, shape in shapes.items()
    }


def _shard(
    model: nn.Module,
    config: ParallelConfig,
    world: World,
    compute: torch.dtype,
    reduce: torch.dtype,
) -> None:
    """FSDP2: a unit for each block, one for its modulation, which is computed just before it, and one for the rest.

    Inputs are not cast, because times and rotary tables must stay fp32.
    """
    assert world.mesh is not None
    policy = MixedPrecisionPolicy(
        param_dtype=None if compute == torch.float32 else compute, reduce_dtype=reduce, cast_forward_inputs=False
    )
    mesh = world.mesh[REPLICATE, SHARD] if world.replicate > 1 else world.mesh[SHARD]
    blocks = _blocks(model)
    modulations = [block.adaLN_modulation for block in blocks if block.adaLN_modulation is not None]
    for modulation in modulations:
        reshard = config.reshard and modulation is not modulations[-1]
        fully_shard(modulation, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy)
    for block in blocks:
        # The backward pass starts with the last block: if it were freed, it would be gathered twice in a row.
        reshard = config.reshard and block is not blocks[-1]
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy)
    fully_shard(model, mesh=mesh, reshard_after_forward=False, mp_policy=policy)


def _blocks(model: nn.Module) -> list[Any]:
    """The blocks of a transformer; of another network none."""
    return [*model.blocks] if isinstance(model, Transformer) else []  # type: ignore[misc]


def sync_gradients(model: nn.Module, on: bool) -> None:
    """Set whether the next backward pass sums gradients over the replicas; only that of the last micro-batch must.

    Over the shards gradients are summed in every pass: until they are, each rank holds whole fp32 gradients, 4 bytes a
    parameter more. That costs a reduce-scatter a micro-batch, which overlaps with the pass.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(on)


def _recomputed(forward: Callable[..., Any], mode: str) -> Callable[..., Any]:
    """`forward` with activation checkpointing: "full", or "selective" as `_policy` says."""
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)

    def run(*args: Any, **more: Any) -> Any:
        return checkpoint(forward, *args, **more, **options) if torch.is_grad_enabled() else forward(*args, **more)

    return run


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
