"""Guidance over any network: classifier-free (Ho & Salimans 2022) or by a weaker model (autoguidance, Karras et al.
2024), within an interval (Kynkäänniemi et al. 2024), with a scale that may follow the noise time (Wang et al. 2024).

The scale s of a request is the mean of w(t) over noise time t uniform in (0, 1), whatever the interval; 1 is no
guidance, so s - 1 is what a schedule deals out. Wang et al. write w = 1 + omega and scale their omega to the same mean.

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

from ldit.diffusion.process import Level
from ldit.errors import RequestError
from ldit.nn.conditioning import TextCondition

Network = Callable[[Tensor, Tensor, Any], Tensor]
_ROUNDING = 1e-9  # of noise times: an interval that ends at a step has that step

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda t: 1.0,
    "linear": lambda t: 2.0 * (1.0 - t),
    "cosine": lambda t: 1.0 + math.cos(math.pi * t),
}
"""Share of s - 1 by noise time; each has mean 1 over [0, 1] and none grows with the noise."""


def check_schedule(name: str) -> str:
    """The name itself, or RequestError."""
    if name not in SCHEDULES:
        raise RequestError(f"guidance_schedule: expected one of {', '.join(SCHEDULES)}, got {name!r}")
    return name


@dataclass
class Guided:
    """out = u + w·(c - u) on the first `channels` channels of the network's output; the others are c's own.

    c is the network's output for `cond`. u is the same network's for `null`, both halves run as one batch
    [conditional; null]; with `weak` it is that network's for the same `cond`, and `null` plays no part. Outside
    `interval` of noise time, and where w is 1, u is not computed. `evaluations` counts conditional calls,
    `guided_rows` the rows of u.
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
    evaluations: int = 0
    guided_rows: int = 0

    def __call__(self, x: Tensor, level: Level) -> Tensor:
        """x (B, C, H, W) fp32 -> the network's output in fp32."""
        self.evaluations += 1
        rows, taken = len(x), x.to(self.dtype)
        # Beside the labels: where those are on the host, a prepared network need not wait for the device.
        home = self.cond.features.device if isinstance(self.cond, TextCondition) else self.cond.device
        time = torch.full((rows,), level.time, dtype=torch.float32, device=home)
        scale = self.scale_at(level.noise_time)
        if scale == 1.0 or (self.null is None and self.weak is None):
            return self.network(taken, time, self.cond).float()
        self.guided_rows += rows
        if self.weak is not None:
            strong, other = self.network(taken, time, self.cond), self.weak(taken, time, self.cond)
        else:
            assert self.null is not None
            both = _cat(self.cond, self.null)
            strong, other = self.network(torch.cat([taken, taken]), torch.cat([time, time]), both).chunk(2)
        c, u, n = strong.float(), other.float(), self.channels
        return torch.cat([u[:, :n] + scale * (c[:, :n] - u[:, :n]), c[:, n:]], dim=1)

    def asked(self, levels: Iterable[Level], second: bool = False) -> list[tuple[float, int]]:
        """(time, label) of what these levels will ask of `network`, in order; with `second` of what they ask of `weak`.
        For class labels."""
        assert isinstance(self.cond, Tensor)
        labels, found = list(dict.fromkeys(self.cond.tolist())), []
        for level in levels:
            guided = self.scale_at(level.noise_time) != 1.0
            found += [(level.time, label) for label in labels if guided or not second]
            if guided and self.weak is None and isinstance(self.null, Tensor):
                found += [(level.time, label) for label in dict.fromkeys(self.null.tolist())]
        return found

    def scale_at(self, noise_time: float) -> float:
        """w at this noise time, 1 outside the interval."""
        low, high = self.interval
        if not low - _ROUNDING <= noise_time <= high + _ROUNDING:
            return 1.0
        if self.schedule == "constant":
            return self.scale  # 1 + (s - 1) would round it
        return 1.0 + (self.scale - 1.0) * SCHEDULES[self.schedule](noise_time)


def _cat(a: Tensor | TextCondition, b: Tensor | TextCondition) -> Tensor | TextCondition:
    if isinstance(a, TextCondition) and isinstance(b, TextCondition):
        return TextCondition.cat([a, b])
    assert isinstance(a, Tensor) and isinstance(b, Tensor)
    return torch.cat([a, b])
