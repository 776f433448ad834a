"""Tells which steps must not be applied (non-finite, loss spike, fp16 overflow); its numbers are saved as JSON."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from ldit.config.sections import GuardConfig

WINDOW = 100  # steps over which the loss's running mean and variance look back
SETTLED = 20  # steps after which mean and variance can tell a spike


@dataclass
class Guard:
    """Running mean and variance of the loss, and the number of consecutive skipped steps (`left_out`)."""

    mean: float = 0.0
    variance: float = 0.0
    count: int = 0
    left_out: int = 0
    rollbacks: int = 0
    """Since the last commit."""

    def limit(self, config: GuardConfig) -> float:
        """The loss above which a step is a spike."""
        if not config.spike_z or self.count < SETTLED:
            return math.inf
        return self.mean + config.spike_z * math.sqrt(self.variance)

    def accept(self, loss: float) -> None:
        """Update the statistics by the loss of an applied step."""
        self.count += 1
        share = 1.0 / min(self.count, WINDOW)
        off = loss - self.mean
        self.mean += share * off
        self.variance = (1 - share) * (self.variance + share * off * off)
        self.left_out = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Scaler:
    """Loss scale of fp16: halved at an overflow, doubled after `PATIENCE` steps without one (Micikevicius et al. 2018).

    Other precisions keep 1, which changes nothing.
    """

    scale: float = 1.0
    good: int = 0

    PATIENCE = 2000
    START = 65536.0

    @classmethod
    def of(cls, precision: str) -> "Scaler":
        return cls(cls.START if precision == "fp16" else 1.0)

    def overflowed(self) -> bool:
        """Halve the loss scale after a non-finite step; False when it is 1 already, so that this cannot help."""
        self.good = 0
        if self.scale <= 1.0:
            return False
        self.scale /= 2
        return True

    def passed(self, precision: str) -> None:
        """Count an applied step; double the scale when it is time."""
        if precision == "fp16":
            self.good += 1
            if self.good == self.PATIENCE:
                self.scale, self.good = min(self.scale * 2, 2.0**24), 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
