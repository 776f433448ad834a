"""The modulations of all blocks, known before the first step: they depend on time and label alone."""

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldit.nn.dit import DiT

ROWS = 32
"""Rows of every product. A row's sum depends on how many there are (a few take other kernels), so there are always as
many: an image does not depend on which labels are asked for beside it, nor on what was planned."""

Pair = tuple[float, int]


class Modulations:
    """Rows (6·D a block in their order, then 2·D of the final layer), by (time, label).

    `plan` says which will be wanted, in their order. A call looks its own up; where they are not there yet, it makes as
    many of those planned from there on as take the memory of the adaLN weights they are made from (`most`), in one pass
    over those, in place of the ones before. What was not planned is made alone. Times are compared as fp32. With `host`
    the adaLN weights (a quarter of a 600M network) are taken off the device, the network's own copies too, and stream
    through it when rows are made.
    """

    def __init__(self, model: DiT, host: bool = False) -> None:
        self.model = model
        self.linears: list[nn.Linear] = [layer.adaLN_modulation[1] for layer in model.layers]  # type: ignore[index, misc]
        self.linears.append(model.final_layer.adaLN_modulation[1])  # type: ignore[arg-type]
        self.widths = [linear.out_features for linear in self.linears]
        self.device, self.dtype = model.x_embedder.weight.device, model.x_embedder.weight.dtype
        self._planned: dict[Pair, int] = {}
        self._made: tuple[Tensor | None, dict[Pair, int]] = (None, {})  # as one: threads may call
        if host:
            for linear in self.linears:
                linear.to("cpu")

    @property
    def most(self) -> int:
        """Rows that take as much memory as the weights they are made from."""
        return self.linears[0].in_features

    def plan(self, pairs: Iterable[Pair]) -> None:
        """What will be wanted, in that order. What was made before is forgotten, unless the same is planned again."""
        listed = [(time, label) for time, label in pairs if not math.isnan(time)]
        exact = torch.tensor([time for time, _ in listed], dtype=torch.float32).tolist()
        keys = dict.fromkeys((time, label) for time, (_, label) in zip(exact, listed, strict=True))
        planned = {pair: place for place, pair in enumerate(keys)}
        if planned != self._planned:
            self._planned, self._made = planned, (None, {})

    def __call__(self, time: Tensor, labels: Tensor) -> Tensor:
        """time (B,) fp32, labels (B,) -> (B, sum of widths). Both are read on the host: where they lie there, nothing
        waits for the device."""
        wanted: list[Pair] = list(zip(time.tolist(), labels.tolist(), strict=True))
        table, places = self._made
        if table is None or any(pair not in places for pair in wanted):
            table, places = self._make(wanted)
        index = torch.tensor([places[pair] for pair in wanted]).to(self.device, non_blocking=True)
        return table.index_select(0, index)

    def _make(self, wanted: Sequence[Pair]) -> tuple[Tensor, dict[Pair, int]]:
        """Rows with those `wanted` among them, and their places; kept where they were planned."""
        planned = self._planned
        alone = list(dict.fromkeys(wanted))
        if all(pair in planned for pair in alone):
            first = min(planned[pair] for pair in alone)
            chunk = list(planned)[first : first + self.most]
            if all(planned[pair] < first + self.most for pair in alone):
                self._made = (None, {})  # the old one goes before the new one comes
                try:
                    self._made = made = self.rows(chunk), {pair: i for i, pair in enumerate(chunk)}
                    return made
                except torch.OutOfMemoryError:
                    pass  # they can be done without
        return self.rows(alone), {pair: i for i, pair in enumerate(alone)}

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
