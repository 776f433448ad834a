"""The request of `ldit plot`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ldit.config.requests.fields import flag

XAxis = Literal["step", "images", "hours"]


@dataclass(frozen=True)
class PlotRequest:
    """Options: the curves of runs as one image."""

    runs: tuple[Path, ...] = field(metadata=flag(positional=True, metavar="RUN [RUN ...]"))
    """Directories of runs, or metrics.jsonl files."""
    out: Path = Path("curves.png")
    """A PNG or SVG, by its name; replaced if it exists."""
    keys: tuple[str, ...] = ()
    """What to draw. Default: loss, eps_mse, grad_norm, lr and images_per_second, where logged. attention_logit/3 is the
    fourth of a list."""
    x: XAxis = "step"
    """Horizontal axis; hours are those of training alone, without samples and measurements. images and hours
    need RUN/config.json beside the metrics."""
    smooth: float = 0.7
    """The line is the mean of the logged values around each, weighted F^distance; in [0, 1), 0 = as logged."""
    log_y: bool = False
    """Logarithmic values."""
