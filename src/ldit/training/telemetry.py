"""Measurements during training: speed, time spent waiting for data, memory, attention logits."""

import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ldit.data.batch import Batch
from ldit.nn.layers import Attention, QKVAttention
from ldit.nn.rope import rotate
from ldit.parallel.world import World

PEAKS = {
    "H200": 989.4e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989.4e12, "A100": 312e12, "B200": 2250e12,
    "L40S": 362e12, "4090": 165.2e12,
}  # fmt: skip
"""Dense bf16 FLOP/s from the datasheets by a part of the device's name; the first that fits counts."""
_SHARE = {"bf16": 1.0, "fp16": 1.0, "tf32": 0.5}


def peak_flops(world: World, precision: str) -> float | None:
    """Peak FLOP/s of all devices of the run together, by datasheet; None for devices that are not listed and CPUs."""
    if world.device.type != "cuda" or precision not in _SHARE:
        return None
    name = torch.cuda.get_device_name(world.device)
    peak = next((peak for word, peak in PEAKS.items() if word in name), None)
    return None if peak is None else peak * _SHARE[precision] * world.size


class Clock:
    """Images per second and the share of time spent waiting for data, since the last log line. Hooks do not count."""

    def __init__(self, step: int) -> None:
        self.restart(step)

    def restart(self, step: int) -> None:
        """Start counting at `step`, now."""
        self.step, self.since, self.waited, self.excluded = step, time.perf_counter(), 0.0, 0.0

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yields the batches and measures how long the loop waits for them."""
        iterator = iter(batches)
        while True:
            began = time.perf_counter()
            batch = next(iterator, None)
            self.waited += time.perf_counter() - began
            if batch is None:
                return
            yield batch

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Excludes the time of the block from the rates."""
        began = time.perf_counter()
        yield
        self.excluded += time.perf_counter() - began

    def rates(self, step: int, batch_size: int, flops_per_image: float, peak: float | None) -> dict[str, float]:
        """images_per_second, data_wait (a share of the time), and mfu where the peak is known; then restarts."""
        spent = max(time.perf_counter() - self.since - self.excluded, 1e-9)
        rate = (step - self.step) * batch_size / spent
        rates = {"images_per_second": round(rate, 2), "data_wait": round(self.waited / spent, 4)}
        if peak:
            rates["mfu"] = round(rate * flops_per_image / peak, 4)
        self.restart(step)
        return rates


def peak_memory(device: torch.device) -> int:
    """Peak memory so far in bytes: of the GPU if there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def largest_logits(model: nn.Module, forward: Callable[[], object], world: World) -> list[float]:
    """max |q·k| / sqrt(d) of each layer's self-attention during `forward()`, over all heads, images and ranks;
    empty for a network without the attention of `ldit.nn.layers`.

    It uses module hooks, so compiled blocks must run eagerly meanwhile.
    """
    maxima: list[Tensor] = []  # a scalar for each layer, in order of the forward pass
    handles = []
    for module in model.modules():
        if isinstance(module, Attention):
            handles += _watch(module, maxima)
        elif isinstance(module, QKVAttention):
            handles.append(_watch_qkv(module, maxima))
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    if not maxima:  # a network of the user's, without this attention
        return []
    largest = torch.stack(maxima)
    if world.size > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.tolist()


def _watch(attention: Attention, maxima: list[Tensor]) -> list[torch.utils.hooks.RemovableHandle]:
    """Hooks that append the largest logit to `maxima`. Queries and keys are the outputs of the q/k norms (identities
    where there are none), rotated by the rotary table."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            seen[name] = out.detach().reshape(*args[0].shape[:2], -1, attention.head_dim).clone()  # (B, N, heads, d)

        return hook

    def conclude(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        q, k = (rotate(seen.pop(name), args[1]).float().transpose(1, 2) for name in ("q", "k"))  # (B, heads, N, d)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # grouped-query attention: a key for each query head
        maxima.append(_largest(q, k))

    return [
        attention.q_norm.register_forward_hook(keep("q")),
        attention.k_norm.register_forward_hook(keep("k")),
        attention.register_forward_hook(conclude),
    ]


def _watch_qkv(attention: QKVAttention, maxima: list[Tensor]) -> torch.utils.hooks.RemovableHandle:
    """The same for attention whose queries and keys are the first two thirds of one linear layer's output."""

    def conclude(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        q, k, _ = out.detach().float().unflatten(-1, (3, attention.heads, -1)).permute(2, 0, 3, 1, 4)
        maxima.append(_largest(q, k))

    return attention.qkv.register_forward_hook(conclude)


def _largest(q: Tensor, k: Tensor) -> Tensor:
    """max |q·k| / sqrt(d) of queries and keys (B, heads, N, d), one image at a time."""
    parts = [(a @ b.transpose(-1, -2)).abs().amax() for a, b in zip(q, k, strict=True)]
    return torch.stack(parts).amax() / q.shape[-1] ** 0.5
