"""Moving averages of the weights, in fp32; each rank averages its own part."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ldit.config.sections import EMAConfig

MAIN = "ema"
POWER = "power-"


def warmed_decay(decay: float, n: int) -> float:
    """min(decay, n/(9+n)) at update n = 1, 2, … (the usual (1+n)/(10+n), counted from 0), so that short runs forget
    their initial weights."""
    return min(decay, n / (9 + n))


def constant_decay(decay: float, n: int) -> float:
    """The decay at every update, as the original has it."""
    return decay


def power_name(sigma_rel: float) -> str:
    """The name of a power-function average in files."""
    return f"{POWER}{sigma_rel:.4f}"


@dataclass(frozen=True)
class Average:
    """One average. `decay(n)` is the share of the old average that update n = 1, 2, … keeps."""

    decay: Callable[[int], float]
    values: list[Tensor]


class Averages:
    """All averages of a run by name: "ema" (the one for sampling and export), "ema-D" with decay D, "power-S" with
    relative width S."""

    def __init__(self, config: EMAConfig, masters: Sequence[Tensor]) -> None:
        form = warmed_decay if config.warmup else constant_decay
        decays: dict[str, Callable[[int], float]] = {MAIN: partial(form, config.decay)}
        decays.update({f"{MAIN}-{decay}": partial(form, decay) for decay in config.more})
        if config.power:
            from ldit.training.posthoc import gamma_of, power_decay

            decays.update({power_name(width): partial(power_decay, gamma_of(width)) for width in config.power})
        self.tracks = {
            name: Average(decay, [torch.empty_like(m, requires_grad=False) for m in masters])
            for name, decay in decays.items()
        }

    @property
    def main(self) -> list[Tensor]:
        return self.tracks[MAIN].values

    @torch.no_grad()
    def start(self, masters: Sequence[Tensor]) -> None:
        """Set every average to the weights."""
        for track in self.tracks.values():
            torch._foreach_copy_(track.values, list(masters))

    @torch.no_grad()
    def update(self, masters: Sequence[Tensor], n: int) -> None:
        """average += (1 - decay(n))·(weights - average), n = 1 for the first update."""
        for track in self.tracks.values():
            torch._foreach_lerp_(track.values, [m.detach() for m in masters], 1.0 - track.decay(n))
