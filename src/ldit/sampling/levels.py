"""Noise levels of both processes, noisiest first, ending in clean data. DDPM indices: here and in diffusion/ddpm.py."""

import math
from dataclasses import dataclass

import numpy as np

from ldit.diffusion.build import Process
from ldit.diffusion.ddpm import DDPM
from ldit.diffusion.flow import Flow


@dataclass(frozen=True)
class Level:
    """x = alpha·x0 + sigma·eps; `time` is what the network is given, `noise_time` in [0, 1] what users speak of."""

    alpha: float
    sigma: float
    time: float
    noise_time: float

    @property
    def length(self) -> float:
        """alpha + sigma: x divided by it moves on a straight line from data to noise."""
        return self.alpha + self.sigma

    @property
    def r(self) -> float:
        """sigma/(alpha + sigma), the time along that line: 0 data, 1 noise."""
        return self.sigma / self.length

    @property
    def half_logsnr(self) -> float:
        """log(alpha/sigma)."""
        if not self.alpha or not self.sigma:
            return math.inf if self.alpha else -math.inf
        return math.log(self.alpha / self.sigma)


CLEAN = Level(1.0, 0.0, math.nan, 0.0)


def ddpm_levels(steps: str) -> list[Level]:
    """The original's respacing strings; "1" keeps the noisiest index (the original fails there)."""
    process = DDPM(kept=(DDPM().steps - 1,)) if steps == "1" else DDPM.respaced(steps)
    cumprod = process.tables.alphas_cumprod
    levels = [
        Level(math.sqrt(a), math.sqrt(1.0 - a), float(index), (index + 1) / process.steps)
        for a, index in zip(cumprod.tolist(), process.timestep_map, strict=True)
    ]
    return [*reversed(levels), CLEAN]


def flow_levels(flow: Flow, steps: int) -> list[Level]:
    """Uniform in t from 1 to 0, then shifted."""
    return [_flow_level(flow, shifted((steps - i) / steps, flow.shift)) for i in range(steps)] + [CLEAN]


def shifted(u: float, k: float) -> float:
    """k·u/(1 + (k-1)·u), exactly 1 for u = 1: a level beyond pure noise has no logarithm."""
    return k * u / (k * u + (1.0 - u))


class Schedule:
    """The levels that a process has between its own ones too."""

    def __init__(self, process: Process) -> None:
        self.process = process
        if isinstance(process, DDPM):
            cumprod = process.tables.alphas_cumprod
            self._lambdas = 0.5 * np.log(cumprod / (1.0 - cumprod))  # falls with the index

    @property
    def least(self) -> float:
        """The smallest noise time of a level: that of index 0; a flow has none."""
        return 1.0 / self.process.steps if isinstance(self.process, DDPM) else 0.0

    def at(self, noise_time: float) -> Level:
        """The level at a noise time in (0, 1]. Between DDPM's indices log(alpha/sigma) is linear in the index."""
        process = self.process
        if isinstance(process, Flow):
            return _flow_level(process, noise_time)
        index = min(max(noise_time * process.steps - 1.0, 0.0), process.steps - 1.0)
        ratio = math.exp(float(np.interp(index, np.arange(process.steps), self._lambdas)))
        return Level(ratio / math.hypot(1.0, ratio), 1.0 / math.hypot(1.0, ratio), index, (index + 1.0) / process.steps)

    def of_ratio(self, ratio: float) -> Level:
        """The level of sigma/alpha = ratio, at most the noisiest."""
        process = self.process
        if isinstance(process, Flow):
            return _flow_level(process, ratio / (1.0 + ratio) if math.isfinite(ratio) else 1.0)
        falling = self._lambdas[::-1]
        index = process.steps - 1.0 - float(np.interp(-math.log(ratio), falling, np.arange(process.steps)))
        return self.at((index + 1.0) / process.steps)


def noise_time(process: Process, time: float) -> float:
    """The noise time of what a network is given: the inverse of a level's `time`."""
    if isinstance(process, DDPM):
        return (time + 1.0) / process.steps
    native = time / process.time_scale
    return native if process.data_at == 0 else 1.0 - native


def _flow_level(flow: Flow, t: float) -> Level:
    return Level(1.0 - t, t, (t if flow.data_at == 0 else 1.0 - t) * flow.time_scale, t)
