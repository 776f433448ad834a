"""Chooses the attention kernels that torch may use on a GPU, each checked once against plain arithmetic."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

_TOKENS = 128
_ROUNDINGS = 4  # of the dtype, relative to the largest value: the kernels sum in other orders


def attention_kernels(device: torch.device, dtype: torch.dtype, head_dim: int) -> Callable[[], AbstractContextManager]:  # type: ignore[type-arg]
    """A context in which scaled_dot_product_attention uses only kernels that are correct for heads of this width.

    The fastest is tried first: cuDNN's from compute capability 9.0 on, flash attention before. The CPU has one kernel,
    so the context does nothing there.
    """
    if device.type != "cuda":
        return nullcontext
    order = list(_checked(device, dtype, head_dim))
    return lambda: sdpa_kernel(order, set_priority=True)


@cache
def _checked(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[SDPBackend, ...]:
    # The order, fastest first: cuDNN's kernel overtakes flash attention from Hopper on.
    order = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    place = 0 if torch.cuda.get_device_capability(device) >= (9, 0) else 1
    order.insert(place, SDPBackend.CUDNN_ATTENTION)
    # The right answer: plain arithmetic in fp32, on random queries, keys and values.
    source = torch.Generator(device).manual_seed(0)
    shape = (1, 2, _TOKENS, head_dim)
    q, k, v = (torch.randn(shape, generator=source, device=device).to(dtype) for _ in range(3))
    with sdpa_kernel(SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    allowed = _ROUNDINGS * torch.finfo(dtype).eps * expected.abs().max()
    # Keep the kernels that run here and agree with it.
    kept = []
    for backend in order:
        try:
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(q, k, v)
        except RuntimeError:  # does not support this width, dtype or device
            continue
        if bool((out.float() - expected).abs().max() <= allowed):
            kept.append(backend)
        else:
            logging.getLogger("ldit").warning(
                "attention kernel %s gives wrong results on this GPU and is not used", backend.name
            )
    return (*kept, SDPBackend.MATH)
