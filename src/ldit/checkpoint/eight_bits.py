"""Weights of exports in 8 bits: a matrix as int8 with a scale for each row, half the bytes of bf16.

Each row is divided by its largest magnitude over 127 and rounded, an error of about 0.8 % of the row's root mean square
(bf16: 0.2 %). Vectors and narrow matrices are stored in bf16. Reading gives fp32, so nothing else knows of it.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ldit.errors import SourceError

SCALE = ":scale"
"""Suffix of the name of a matrix's scales."""
NARROWEST = 32  # columns of a matrix that is stored so
_MOST = 127


def packed(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """What is stored of these tensors."""
    for name, tensor in tensors:
        if tensor.ndim != 2 or tensor.shape[1] < NARROWEST or not tensor.is_floating_point():
            yield name, tensor.bfloat16() if tensor.is_floating_point() else tensor
            continue
        rows = tensor.float()
        scale = (rows.abs().amax(1) / _MOST).clamp(min=torch.finfo(torch.float32).tiny)
        yield name, (rows / scale[:, None]).round().to(torch.int8)
        yield name + SCALE, scale


def unpacked(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The tensors that `packed` was given, matrices as fp32; others pass through. SourceError names a matrix without
    its scales."""
    waiting: dict[str, Tensor] = {}
    for name, tensor in tensors:
        whole = name.removesuffix(SCALE)
        if name == whole and tensor.dtype != torch.int8:
            yield name, tensor
        elif whole not in waiting:
            waiting[whole] = tensor
        else:
            pair = (tensor, waiting.pop(whole))
            matrix, scale = pair if tensor.dtype == torch.int8 else pair[::-1]
            if matrix.ndim != 2 or scale.shape != matrix.shape[:1]:
                raise SourceError(f"{whole}: {tuple(scale.shape)} scales for a matrix of {tuple(matrix.shape)}")
            yield whole, matrix.float() * scale[:, None]
    if waiting:
        raise SourceError(f"{min(waiting)} is stored in 8 bits without its other half")
