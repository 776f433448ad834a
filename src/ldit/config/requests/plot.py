"""The request of `ldit plot`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ldit.config.requests.fields import flag

XAxis = Literal["step", "images", "hours"]


@dataclass(frozen=True)
class PlotRequest:
    """Options: which curves are drawn, and how."""

    runs: tuple[Path, ...] = field(metadata=flag(positional=True, metavar="RUN [RUN ...]"))
    """Run directories, or metrics.jsonl files."""
    out: Path = Path("curves.png")
    """PNG or SVG file to write; replaced if it exists."""
    keys: tuple[str, ...] = ()
    """Keys of metrics.jsonl to draw, a panel each. Default: loss, eps_mse, grad_norm, lr and images_per_second, where
    logged. attention_logit/3 is the fourth entry of a list."""
    x: XAxis = "step"
    """Horizontal axis. hours count training time only, without sample grids and evaluations. images and hours need
    RUN/config.json beside the metrics."""
    smooth: float = 0.7
    """Smoothing F in [0, 1), 0 = off: each point is a weighted mean of the logged values, F^d for the value d records
    away. Curves of fewer than 20 values are drawn as they are."""
    log_y: bool = False
    """Logarithmic vertical axis."""
