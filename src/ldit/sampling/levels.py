"""Grids of noise levels, noisiest first, ending in clean data. DDPM indices: here and in diffusion/ddpm.py only."""

import math
from dataclasses import dataclass

from ldit.diffusion.ddpm import DDPM
from ldit.diffusion.flow import Flow


@dataclass(frozen=True)
class Level:
    """x = alpha·x0 + sigma·eps; `time` is what the network is given, `noise_time` in [0, 1] what users speak of."""

    alpha: float
    sigma: float
    time: float
    noise_time: float


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
    times = [flow.shift * u / (1.0 + (flow.shift - 1.0) * u) for u in (1.0 - i / steps for i in range(steps))]
    return [Level(1.0 - t, t, (t if flow.data_at == 0 else 1.0 - t) * flow.time_scale, t) for t in times] + [CLEAN]
