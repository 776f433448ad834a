"""Classifier-free guidance (Ho & Salimans 2022) over any network, with an interval (Kynkäänniemi et al. 2024)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldit.nn.conditioning import TextCondition
from ldit.sampling.levels import Level

Network = Callable[[Tensor, Tensor, Any], Tensor]


@dataclass
class Guided:
    """out = u + scale·(c - u) on the first `channels` channels of the network's output; the others are c's own.

    Both halves run as one batch [conditional; null]. Outside `interval` of noise time, or at scale 1, the null half is
    not computed. `evaluations` counts conditional calls, `guided_rows` the null rows.
    """

    network: Network
    cond: Tensor | TextCondition
    null: Tensor | TextCondition | None
    scale: float
    channels: int
    interval: tuple[float, float] = (0.0, 1.0)
    dtype: torch.dtype = torch.float32
    evaluations: int = 0
    guided_rows: int = 0

    def __call__(self, x: Tensor, level: Level) -> Tensor:
        """x (B, C, H, W) fp32 -> the network's output in fp32."""
        self.evaluations += 1
        rows = len(x)
        time = torch.full((rows,), level.time, dtype=torch.float32, device=x.device)
        inside = self.interval[0] <= level.noise_time <= self.interval[1]
        if self.null is None or self.scale == 1.0 or not inside:
            return self.network(x.to(self.dtype), time, self.cond).float()
        self.guided_rows += rows
        both = _cat(self.cond, self.null)
        out = self.network(torch.cat([x, x]).to(self.dtype), torch.cat([time, time]), both).float()
        conditional, unconditional = out.chunk(2)
        n = self.channels
        mixed = unconditional[:, :n] + self.scale * (conditional[:, :n] - unconditional[:, :n])
        return torch.cat([mixed, conditional[:, n:]], dim=1)


def _cat(a: Tensor | TextCondition, b: Tensor | TextCondition) -> Tensor | TextCondition:
    if isinstance(a, TextCondition) and isinstance(b, TextCondition):
        return TextCondition.cat([a, b])
    assert isinstance(a, Tensor) and isinstance(b, Tensor)
    return torch.cat([a, b])
