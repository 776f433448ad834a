"""Computes the modulations of all blocks for many steps at once: they depend on time and label alone."""

import math
from collections.abc import Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldit.nn.dit import DiT

ROWS = 32
"""Rows of every matrix product, filled up where needed. Products of few rows use other kernels, which sum in another
order. With a constant number an image does not depend on the other labels of its request, nor on the plan."""

Pair = tuple[float, int]
"""(time, label)."""


class ModulationCache:
    """A row for each (time, label): the outputs of the network's `adaln_layers`, side by side.

    `plan` names the pairs that will be asked for, in order. A call looks up its rows. If one is missing, the planned
    rows from there on are computed in one pass over the adaLN weights, as many as take the memory of those weights
    (`most`), and replace the rows before. Pairs that were not planned are computed alone. Times are compared as fp32.
    With `host` the adaLN weights (a quarter of a 600M network) move to the host, for the network too, and are streamed
    to the device when rows are computed.
    """

    def __init__(self, model: DiT, host: bool = False) -> None:
        self.model = model
        self.linears = [cast(nn.Linear, modulation[1]) for modulation in model.adaln_layers()]
        self.widths = [linear.out_features for linear in self.linears]
        self.device, self.dtype = model.x_embedder.weight.device, model.x_embedder.weight.dtype
        self._planned: dict[Pair, int] = {}
        # The rows there are and the place of each pair, replaced together because threads may call.
        self._cached: tuple[Tensor | None, dict[Pair, int]] = (None, {})
        if host:
            for linear in self.linears:
                linear.to("cpu")

    @property
    def most(self) -> int:
        """Number of rows that take as much memory as the adaLN weights."""
        return self.linears[0].in_features

    def plan(self, pairs: Iterable[Pair]) -> None:
        """Announce the pairs that will be asked for, in order. Cached rows are dropped unless the plan is the same."""
        # Distinct pairs in order, times rounded to fp32 as calls have them. Clean data (NaN) is not evaluated.
        listed = [(time, label) for time, label in pairs if not math.isnan(time)]
        rounded = torch.tensor([time for time, _ in listed], dtype=torch.float32).tolist()
        keys = dict.fromkeys((time, label) for time, (_, label) in zip(rounded, listed, strict=True))
        planned = {pair: place for place, pair in enumerate(keys)}
        if planned != self._planned:
            self._planned, self._cached = planned, (None, {})

    def __call__(self, time: Tensor, labels: Tensor) -> Tensor:
        """time (B,) fp32, labels (B,) -> (B, sum of widths). With both on the host nothing waits for the device."""
        pairs: list[Pair] = list(zip(time.tolist(), labels.tolist(), strict=True))
        table, places = self._cached
        if table is None or any(pair not in places for pair in pairs):
            table, places = self._compute(pairs)
        index = torch.tensor([places[pair] for pair in pairs]).to(self.device, non_blocking=True)
        return table.index_select(0, index)

    def _compute(self, pairs: Sequence[Pair]) -> tuple[Tensor, dict[Pair, int]]:
        """Rows that include those of `pairs`, and their places; cached if all were planned."""
        planned = self._planned
        distinct = list(dict.fromkeys(pairs))
        # The next chunk of the plan, if it has all these pairs.
        if all(pair in planned for pair in distinct):
            first = min(planned[pair] for pair in distinct)
            chunk = list(planned)[first : first + self.most]
            if all(planned[pair] < first + self.most for pair in distinct):
                self._cached = (None, {})  # frees the memory of the old rows first
                try:
                    self._cached = cached = self.rows(chunk), {pair: i for i, pair in enumerate(chunk)}
                    return cached
                except torch.OutOfMemoryError:
                    pass  # the chunk only saves time
        # Else these pairs alone.
        return self.rows(distinct), {pair: i for i, pair in enumerate(distinct)}

    def rows(self, pairs: Sequence[Pair]) -> Tensor:
        """The rows of these pairs (P, sum of widths), in their order."""
        # Fill up with the last pair to a multiple of ROWS.
        filled = [*pairs, *[pairs[-1]] * (-len(pairs) % ROWS)]
        time = torch.tensor([pair[0] for pair in filled], dtype=torch.float32, device=self.device)
        label = torch.tensor([pair[1] for pair in filled], device=self.device)
        # SiLU of the conditioning vectors, then each adaLN layer in turn, whose weights may have to be streamed.
        vectors = [F.silu(self.model.condition(t, y)) for t, y in zip(time.split(ROWS), label.split(ROWS), strict=True)]
        out = torch.empty(len(filled), sum(self.widths), dtype=self.dtype, device=self.device)
        for linear, columns in zip(self.linears, out.split(self.widths, dim=1), strict=True):
            weight, bias = (p.to(self.device, non_blocking=True) for p in (linear.weight, linear.bias))
            for vector, part in zip(vectors, columns.split(ROWS), strict=True):
                part.copy_(F.linear(vector, weight, bias))
        return out[: len(pairs)]
