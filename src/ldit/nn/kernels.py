"""What kernels a GPU has: attention, each kernel checked once against plain arithmetic; and those of Triton."""

import logging
import os
import shutil
import sysconfig
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

_LENGTHS = (64, 200, 256)  # tokens: kernels of other tiles, and a length that divides none
_LONGEST = 4096  # plain arithmetic takes memory by the square of the length
# Errors of the output and of gradients in roundings of the dtype, relative to the largest value: kernels sum in other
# orders, and round probabilities on the way to gradients. In fp32 the efficient kernel uses three TF32 products.
_HALF, _FP32 = (4, 16), (64, 256)
_CUDNN = 91500  # cuDNN's kernel is right for all lengths from the version after this


def attention_kernels(
    device: torch.device, dtype: torch.dtype, head_dim: int, lengths: Collection[int] = ()
) -> Callable[[], AbstractContextManager]:  # type: ignore[type-arg]
    """A context in which scaled_dot_product_attention uses only kernels that are correct for heads of this width,
    forward and backward; also for sequences of these `lengths`, where not longer than `_LONGEST`.

    The fastest is tried first: cuDNN's on compute capability 9.0, flash attention elsewhere. The CPU has one kernel, so
    the context does nothing there.
    """
    if device.type != "cuda":
        return nullcontext
    order = list(_checked(device, dtype, head_dim, _bounded(lengths)))
    return lambda: sdpa_kernel(order, set_priority=True)


def software(device: torch.device, dtype: torch.dtype, head_dim: int = 0, lengths: Collection[int] = ()) -> str:
    """What a run computes with: the version of torch, and on a GPU that of cuDNN and, for a network with heads, the
    attention kernel in use."""
    if device.type != "cuda":
        return f"torch {torch.__version__}"
    found = f"torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}"
    if not head_dim:
        return found
    return f"{found}, {_checked(device, dtype, head_dim, _bounded(lengths))[0].name.split('_')[0].lower()} attention"


def _bounded(lengths: Collection[int]) -> tuple[int, ...]:
    return tuple(sorted({min(length, _LONGEST) for length in (*_LENGTHS, *lengths)}))


@cache
def has_triton(device: torch.device) -> bool:
    """Whether the device runs kernels of Triton, torch.compile's among them: they need Triton, which comes with CUDA
    builds of torch on Linux, and a C compiler with Python's headers."""
    headers = Path(sysconfig.get_path("include"), "Python.h")
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if device.type != "cuda" or compiler is None or not headers.is_file():
        return False
    if torch.cuda.get_device_capability(device) < (7, 0):
        return False
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


@cache
def _checked(
    device: torch.device, dtype: torch.dtype, head_dim: int, lengths: tuple[int, ...]
) -> tuple[SDPBackend, ...]:
    # The order, fastest first.
    order = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    hopper = torch.cuda.get_device_capability(device) == (9, 0) and (torch.backends.cudnn.version() or 0) > _CUDNN
    order.insert(0 if hopper else 1, SDPBackend.CUDNN_ATTENTION)
    # Keep the kernels that run here and agree with plain arithmetic in fp32.
    kept = []
    for backend in order:
        try:
            right = all(_agrees(backend, device, dtype, head_dim, length) for length in lengths)
        except RuntimeError:  # does not support this width, dtype or device
            continue
        if right:
            kept.append(backend)
        else:
            logging.getLogger("ldit").warning(
                "attention kernel %s gives wrong results on this GPU and is not used", backend.name
            )
    return (*kept, SDPBackend.MATH)


def _agrees(backend: SDPBackend, device: torch.device, dtype: torch.dtype, head_dim: int, tokens: int) -> bool:
    """Whether a kernel's output and gradients are those of plain arithmetic in fp32, on random inputs."""
    source = torch.Generator(device).manual_seed(tokens)
    shape = (1, 2, tokens, head_dim)
    forward, backward = _FP32 if dtype == torch.float32 else _HALF
    with torch.inference_mode(False), torch.enable_grad():
        *inputs, grad = (torch.randn(shape, generator=source, device=device).to(dtype) for _ in range(4))
        found = _outputs(backend, inputs, grad)
        expected = _outputs(SDPBackend.MATH, [x.float() for x in inputs], grad.float())
    for roundings, one, other in zip((forward, *[backward] * 3), found, expected, strict=True):
        allowed = roundings * torch.finfo(dtype).eps * other.abs().max()
        if not bool((one.float() - other).abs().max() <= allowed):  # also of NaN
            return False
    return True


def _outputs(backend: SDPBackend, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """The output of attention, and the gradients of its inputs."""
    q, k, v = (x.detach().requires_grad_() for x in inputs)
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(q, k, v)
        return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]
