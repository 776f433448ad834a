"""The modulations of all blocks, known before the first step: they depend on time and label alone."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldit.nn.dit import DiT

ROWS = 32
"""Rows of every product. A row's sum depends on how many there are (a few take other kernels), so there are always as
many: a picture does not depend on which labels are asked for beside it, nor on what was planned."""

Pair = tuple[float, int]


class Modulations:
    """Rows (6·D a block in their order, then 2·D of the final layer), by (time, label).

    `plan` makes those of all steps and labels in one pass over the adaLN weights. A call looks them up; what was not
    planned is made then. Times are compared as fp32. With `host` the adaLN weights (a quarter of a 600M network) are
    taken off the device, the network's own copies too, and stream through it when rows are made.
    """

    def __init__(self, model: DiT, host: bool = False) -> None:
        self.model = model
        self.linears: list[nn.Linear] = [layer.adaLN_modulation[1] for layer in model.layers]  # type: ignore[index, misc]
        self.linears.append(model.final_layer.adaLN_modulation[1])  # type: ignore[arg-type]
        self.widths = [linear.out_features for linear in self.linears]
        self.device, self.dtype = model.x_embedder.weight.device, model.x_embedder.weight.dtype
        self._table: Tensor | None = None
        self._places: dict[Pair, int] = {}
        if host:
            self._move(torch.device("cpu"))

    @property
    def most(self) -> int:
        """Rows that take as much memory as the weights they are made from."""
        return self.linears[0].in_features

    def plan(self, times: Sequence[float], labels: Sequence[int]) -> None:
        """Make the rows of every pair; what was planned before is forgotten. More pairs than `most` are left to the
        calls, each of which then makes those of its own batch, by weights on the device."""
        self._table, self._places = None, {}
        exact = torch.tensor(list(times), dtype=torch.float32).tolist()
        pairs = list(dict.fromkeys((time, label) for time in exact if not math.isnan(time) for label in labels))
        if len(pairs) > self.most:
            self._move(self.device)
        elif pairs:
            self._table, self._places = self.rows(pairs), {pair: i for i, pair in enumerate(pairs)}

    def __call__(self, time: Tensor, labels: Tensor) -> Tensor:
        """time (B,) fp32, labels (B,) -> (B, sum of widths). Both are read on the host: where they lie there, nothing
        waits for the device."""
        wanted: list[Pair] = list(zip(time.tolist(), labels.tolist(), strict=True))
        table, places = self._table, self._places
        if table is None or any(pair not in places for pair in wanted):
            pairs = list(dict.fromkeys(wanted))
            table, places = self.rows(pairs), {pair: i for i, pair in enumerate(pairs)}
        index = torch.tensor([places[pair] for pair in wanted]).to(self.device, non_blocking=True)
        return table.index_select(0, index)

    def rows(self, pairs: Sequence[Pair]) -> Tensor:
        """The rows of these pairs, in their order."""
        filled = [*pairs, *[pairs[-1]] * (-len(pairs) % ROWS)]
        time = torch.tensor([pair[0] for pair in filled], dtype=torch.float32, device=self.device)
        label = torch.tensor([pair[1] for pair in filled], device=self.device)
        vectors = [F.silu(self.model.condition(t, y)) for t, y in zip(time.split(ROWS), label.split(ROWS), strict=True)]
        out = torch.empty(len(filled), sum(self.widths), dtype=self.dtype, device=self.device)
        for linear, columns in zip(self.linears, out.split(self.widths, dim=1), strict=True):
            weight, bias = (p.to(self.device, non_blocking=True) for p in (linear.weight, linear.bias))
            for vector, part in zip(vectors, columns.split(ROWS), strict=True):
                part.copy_(F.linear(vector, weight, bias))
        return out[: len(pairs)]

    def _move(self, device: torch.device) -> None:
        for linear in self.linears:
            linear.to(device)
