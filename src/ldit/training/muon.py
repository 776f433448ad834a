"""Muon: momentum whose matrices are orthogonalised (Jordan et al. 2024), over sharded matrices.

The arithmetic is torch.optim.Muon's with `adjust_lr_fn="match_rms_adamw"` (Liu et al. 2025), so AdamW's learning rate
and weight decay serve both; one process in bf16 agrees with it. torch's own takes full matrices only. Here momentum
stays sharded. Each rank gathers one full matrix at a time and orthogonalises it, so the ranks share the work.

In pieces ("chunked"), what is stacked in one parameter is orthogonalised apart, and matrices of one shape in a batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldit.parallel.exchange import ModelGroup, gather_whole, scatter_parts
from ldit.parallel.layout import Layout

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
EPS = 1e-7
RMS = 0.2  # of AdamW's typical update
BATCH_VALUES = 1 << 22  # numbers of a rank's matrices that are orthogonalised in one batch


def orthogonalised(matrix: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """U·S'·Vᵀ of matrix = U·S·Vᵀ with S' near 1, by five Newton-Schulz iterations
    X <- aX + (bA + cA²)X, A = X·Xᵀ, in `dtype`. A matrix (r, c), or a batch of them (n, r, c)."""
    a, b, c = COEFFICIENTS
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = (matrix.mT if tall else matrix).to(dtype, copy=True)
    size = x.norm() if x.ndim == 2 else x.norm(dim=(-2, -1), keepdim=True)
    x.div_(size.clamp(min=EPS))
    add = torch.addmm if x.ndim == 2 else torch.baddbmm
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = add(x, add(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def row_normalised(matrices: Tensor) -> Tensor:
    """Matrices (n, r, c) with rows of equal length, of the Frobenius norm that orthogonal matrices have."""
    rows, columns = matrices.shape[-2:]
    length = matrices.norm(dim=-1, keepdim=True).clamp(min=EPS)
    return matrices / length * math.sqrt(min(rows, columns) / rows)


@dataclass(frozen=True)
class MuonSettings:
    """`dtype`: that of the iterations. `pieces`: the number of matrices that are stacked in each parameter, such as
    the six of an adaLN layer, each orthogonalised by itself; None = parameters are whole, and taken one by one rather
    than in batches of equal shape. `every`: of so many steps one is orthogonalised, the others normalise rows."""

    momentum: float = 0.95
    weight_decay: float = 0.0
    dtype: torch.dtype = torch.bfloat16
    pieces: tuple[int, ...] | None = None
    every: int = 1


class Muon:
    """Nesterov momentum, orthogonalised, times lr·0.2·sqrt(max(rows, columns)); decoupled weight decay."""

    def __init__(
        self,
        matrices: Sequence[nn.Parameter],
        layouts: Sequence[Layout],
        model_group: ModelGroup,
        settings: MuonSettings,
    ) -> None:
        self.matrices, self.layouts, self.model_group = list(matrices), list(layouts), model_group
        self.settings = settings
        self.buffers = [torch.zeros_like(m, requires_grad=False) for m in matrices]
        self._turns = self._in_turns()

    def _pieces(self, i: int) -> int:
        return 1 if self.settings.pieces is None else self.settings.pieces[i]

    def _in_turns(self) -> list[list[int]]:
        """Indices of the matrices that are worked on together: one for each rank of the group, or, in batches, as many
        of one shape as take `BATCH_VALUES`."""
        ranks = len(self.model_group)
        if self.settings.pieces is None:
            everything = list(range(len(self.matrices)))
            return [everything[first : first + ranks] for first in range(0, len(everything), ranks)]
        alike: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for i, layout in enumerate(self.layouts):
            alike.setdefault((layout.shape, self._pieces(i)), []).append(i)
        turns = []
        for (shape, _), indices in alike.items():
            count = ranks * max(1, BATCH_VALUES // math.prod(shape))
            turns += [indices[first : first + count] for first in range(0, len(indices), count)]
        return turns

    @torch.no_grad()
    def step(
        self, grads: Sequence[Tensor], lr: float, sound: Tensor, number: int = 0, factor: Tensor | None = None
    ) -> None:
        """Apply gradients, one for each matrix, times `factor` (None = 1), if `sound`, a bool on the device, is true;
        otherwise change nothing. `number` counts steps, for `every`."""
        ranks = len(self.model_group)
        for turn in self._turns:
            # One matrix for each rank at a time; in the last round some ranks may have none.
            rounds = [turn[first : first + ranks] for first in range(0, len(turn), ranks)]
            updates = {i: self._momentum(i, grads[i], sound, factor) for i in turn}
            wholes: list[Tensor | None] = []
            for indices in rounds:
                # All ranks send their parts, and this one receives its full matrix.
                empty = [None] * (ranks - len(indices))
                wholes.append(
                    gather_whole([*(updates[i] for i in indices), *empty], self._laid(indices), self.model_group)
                )
            directions = self._directions(wholes, turn[0], number, updates[turn[0]].dtype)
            # Each rank sends the parts of its directions back.
            for indices, whole in zip(rounds, directions, strict=True):
                parts = scatter_parts(whole, self._laid(indices), self.model_group, updates[turn[0]])
                for i, part in zip(indices, parts, strict=False):
                    assert part is not None
                    self._apply(i, part, lr, sound)

    def _laid(self, indices: Sequence[int]) -> list[Layout | None]:
        return [*(self.layouts[i] for i in indices), *[None] * (len(self.model_group) - len(indices))]

    def _directions(
        self, wholes: Sequence[Tensor | None], first: int, number: int, dtype: torch.dtype
    ) -> list[Tensor | None]:
        """The directions of this rank's full matrices, which have the shape and pieces of matrix `first`."""
        if self.settings.pieces is None:
            inside = self.settings.dtype
            return [None if whole is None else orthogonalised(whole, inside).to(dtype) for whole in wholes]
        own = [whole for whole in wholes if whole is not None]
        if not own:
            return list(wholes)
        stacked = torch.stack(own).unflatten(1, (self._pieces(first), -1))  # (n, pieces, r, c)
        flat = stacked.flatten(0, 1)
        is_full = number % self.settings.every == 0
        found = orthogonalised(flat, self.settings.dtype).to(dtype) if is_full else row_normalised(flat)
        left = iter(found.view_as(stacked).flatten(1, 2))
        return [None if whole is None else next(left) for whole in wholes]

    def _momentum(self, i: int, grad: Tensor, sound: Tensor, factor: Tensor | None) -> Tensor:
        buffer, grad = self.buffers[i], grad.float()
        if factor is not None:
            grad = grad * factor
        grad = torch.where(sound, grad, buffer)  # lerp of equals changes nothing, whatever the gradient holds
        buffer.lerp_(grad, 1 - self.settings.momentum)
        return grad.lerp(buffer, self.settings.momentum)

    def _apply(self, i: int, direction: Tensor, lr: float, sound: Tensor) -> None:
        matrix, (rows, columns) = self.matrices[i], self.layouts[i].shape
        rate = lr * RMS * math.sqrt(max(rows // self._pieces(i), columns))
        moved = matrix.mul(1 - lr * self.settings.weight_decay).sub_(direction, alpha=rate)
        torch.where(sound, moved, matrix, out=matrix)
