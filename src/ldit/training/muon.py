"""Muon: momentum whose matrices are orthogonalised (Jordan et al. 2024), over sharded matrices.

The arithmetic is torch.optim.Muon's with `adjust_lr_fn="match_rms_adamw"` (Liu et al. 2025), so AdamW's learning rate
and weight decay serve both; one process in bf16 agrees with it. torch's own takes full matrices only. Here momentum
stays sharded. Each rank gathers one full matrix at a time and orthogonalises it, so the ranks share the work.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldit.parallel.exchange import ModelGroup, gather_whole, scatter_parts
from ldit.parallel.layout import Layout

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
EPS = 1e-7
RMS = 0.2  # of AdamW's typical update


def orthogonalised(matrix: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """U·S'·Vᵀ of matrix = U·S·Vᵀ with S' near 1, by five Newton-Schulz iterations
    X <- aX + (bA + cA²)X, A = X·Xᵀ, in `dtype`."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix).to(dtype, copy=True)
    x.div_(x.norm().clamp(min=EPS))
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Muon:
    """Nesterov momentum, orthogonalised, times lr·0.2·sqrt(max(rows, columns)); decoupled weight decay."""

    def __init__(
        self,
        matrices: Sequence[nn.Parameter],
        layouts: Sequence[Layout],
        model_group: ModelGroup,
        momentum: float,
        weight_decay: float,
        dtype: torch.dtype,
    ) -> None:
        self.matrices, self.layouts, self.model_group = list(matrices), list(layouts), model_group
        self.momentum, self.weight_decay, self.dtype = momentum, weight_decay, dtype
        self.buffers = [torch.zeros_like(m, requires_grad=False) for m in matrices]

    @torch.no_grad()
    def step(self, lr: float, sound: Tensor) -> None:
        """Apply the gradients if `sound`, a bool on the device, is true; otherwise change nothing."""
        # One matrix for each rank of the group in every turn; in the last turn some ranks may have none.
        for first in range(0, len(self.matrices), len(self.model_group)):
            indices = range(first, min(first + len(self.model_group), len(self.matrices)))
            updates = [self._momentum(i, sound) for i in indices]
            missing = len(self.model_group) - len(indices)
            layouts: list[Layout | None] = [*(self.layouts[i] for i in indices), *[None] * missing]
            # All ranks send their parts; this one receives its full matrix, orthogonalises it, and sends parts back.
            full = gather_whole([*updates, *[None] * missing], layouts, self.model_group)
            if full is not None:
                full = orthogonalised(full, self.dtype).to(updates[0].dtype)
            parts = scatter_parts(full, layouts, self.model_group, updates[0])
            for i, part in zip(indices, parts, strict=False):
                assert part is not None
                self._apply(i, part, lr, sound)

    def _momentum(self, i: int, sound: Tensor) -> Tensor:
        buffer, grad = self.buffers[i], self.matrices[i].grad
        assert grad is not None
        grad = torch.where(sound, grad, buffer)  # lerp of equals changes nothing, whatever the gradient holds
        buffer.lerp_(grad, 1 - self.momentum)
        return grad.lerp(buffer, self.momentum)

    def _apply(self, i: int, direction: Tensor, lr: float, sound: Tensor) -> None:
        matrix, size = self.matrices[i], self.layouts[i].shape
        rate = lr * RMS * math.sqrt(max(size))
        moved = matrix.mul(1 - lr * self.weight_decay).sub_(direction, alpha=rate)
        torch.where(sound, moved, matrix, out=matrix)
