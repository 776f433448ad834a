"""Guidance of any network: classifier-free, by a weaker model, or by the network's own second head.

Classifier-free guidance is Ho & Salimans 2022; a weaker model instead is autoguidance (Karras et al. 2024), and the
network's own output after a part of its blocks is internal guidance, which costs no second evaluation. All apply
within an interval of noise time (Kynkäänniemi et al. 2024), with a scale w(t) that may depend on noise time (Wang et
al. 2024). The scale s of a request is the mean of w(t) over t uniform in (0, 1), whatever the interval. s = 1 means no
guidance, so a schedule distributes s - 1. Wang et al. write w = 1 + omega and scale omega to the same mean.

| schedule | w(t)                         | from noise to data     |
|----------|------------------------------|------------------------|
| constant | s                            | s                      |
| linear   | 1 + (s - 1)·2·(1 - t)        | 1 to 2s - 1, straight  |
| cosine   | 1 + (s - 1)·(1 + cos(pi·t))  | 1 to 2s - 1, flat ends |
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldit.diffusion.process import Level, output_of
from ldit.errors import RequestError
from ldit.nn.conditioning import TextCondition

Network = Callable[..., Any]
"""network(x, time, cond) -> its output, a Tensor or a Prediction; with mid=True its two outputs."""
_ROUNDING = 1e-9  # tolerance of noise times, so that an interval includes the step at its end

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda t: 1.0,
    "linear": lambda t: 2.0 * (1.0 - t),
    "cosine": lambda t: 1.0 + math.cos(math.pi * t),
}
"""Factor on s - 1 by noise time; each has mean 1 over [0, 1], and none increases with noise."""


def check_schedule(name: str) -> str:
    """The name, or RequestError if there is no such schedule."""
    if name not in SCHEDULES:
        raise RequestError(f"guidance_schedule: expected one of {', '.join(SCHEDULES)}, got {name!r}")
    return name


@dataclass
class Guided:
    """out = u + w·(c - u) on the first `channels` channels of the network's output; the other channels are c's.

    c is the network's output for `cond`. u is its output for `null`, run as one batch [conditional; null]; with
    `weak`, u is that network's output for `cond`, and `null` is not used. With `internal`, u is the output of the
    network's own second head. Outside `interval` of noise time, and where
    w is 1, u is not computed. `evaluations` counts conditional calls, `guided_rows` the rows of u.
    """

    network: Network
    cond: Tensor | TextCondition
    null: Tensor | TextCondition | None
    scale: float
    channels: int
    interval: tuple[float, float] = (0.0, 1.0)
    dtype: torch.dtype = torch.float32
    schedule: str = "constant"
    weak: Network | None = None
    internal: bool = False
    evaluations: int = 0
    guided_rows: int = 0

    def __call__(self, x: Tensor, level: Level) -> Tensor:
        """x (B, C, H, W) fp32 -> the network's output in fp32."""
        self.evaluations += 1
        # Times are put on the device of the labels: with both on the host, an inference copy reads them without a sync.
        rows, x = len(x), x.to(self.dtype)
        device = self.cond.features.device if isinstance(self.cond, TextCondition) else self.cond.device
        time = torch.full((rows,), level.time, dtype=torch.float32, device=device)
        # Without guidance one conditional call is all.
        scale = self.scale_at(level.noise_time)
        if scale == 1.0 or (self.null is None and self.weak is None and not self.internal):
            return output_of(self.network(x, time, self.cond))
        # c and u: from the two heads of one network, from two networks, or from both halves of one batch.
        self.guided_rows += 0 if self.internal else rows
        if self.internal:
            c, u = (out.float() for out in self.network(x, time, self.cond, mid=True))
        elif self.weak is not None:
            c, u = output_of(self.network(x, time, self.cond)), output_of(self.weak(x, time, self.cond))
        else:
            assert self.null is not None
            both = _cat(self.cond, self.null)
            c, u = output_of(self.network(torch.cat([x, x]), torch.cat([time, time]), both)).chunk(2)
        # Combined in fp32, on the guided channels alone.
        n = self.channels
        return torch.cat([u[:, :n] + scale * (c[:, :n] - u[:, :n]), c[:, n:]], dim=1)

    def network_calls(self, levels: Iterable[Level], of_weak: bool = False) -> list[tuple[float, int]]:
        """The pairs (time, label) of the calls of `network`, or with `of_weak` of `weak`, at these levels, in order.

        For class labels only; an inference copy prepares its conditioning from them.
        """
        assert isinstance(self.cond, Tensor)
        labels, pairs = list(dict.fromkeys(self.cond.tolist())), []
        for level in levels:
            guided = self.scale_at(level.noise_time) != 1.0
            pairs += [(level.time, label) for label in labels if guided or not of_weak]
            if guided and self.weak is None and not self.internal and isinstance(self.null, Tensor):
                pairs += [(level.time, label) for label in dict.fromkeys(self.null.tolist())]
        return pairs

    def scale_at(self, noise_time: float) -> float:
        """w at this noise time, 1 outside the interval."""
        low, high = self.interval
        if not low - _ROUNDING <= noise_time <= high + _ROUNDING:
            return 1.0
        if self.schedule == "constant":
            return self.scale  # 1 + (s - 1) would round
        return 1.0 + (self.scale - 1.0) * SCHEDULES[self.schedule](noise_time)


def _cat(a: Tensor | TextCondition, b: Tensor | TextCondition) -> Tensor | TextCondition:
    if isinstance(a, TextCondition) and isinstance(b, TextCondition):
        return TextCondition.cat([a, b])
    assert isinstance(a, Tensor) and isinstance(b, Tensor)
    return torch.cat([a, b])
