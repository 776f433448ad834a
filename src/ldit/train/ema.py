"""Exponential moving average of the weights, fp32, in foreach passes."""

from collections.abc import Sequence

import torch
from torch import Tensor


class EMA:
    """ema += (1 - d)·(weights - ema) with d = min(decay, (1+n)/(10+n)) at update n = 0, 1, …; warm-up lets short runs
    forget their initial weights."""

    def __init__(self, parameters: Sequence[Tensor], decay: float) -> None:
        self.decay = decay
        self.average = [p.detach().clone().float() for p in parameters]

    @torch.no_grad()
    def update(self, parameters: Sequence[Tensor], n: int) -> None:
        decay = min(self.decay, (1 + n) / (10 + n))
        torch._foreach_lerp_(self.average, [p.detach() for p in parameters], 1.0 - decay)
