"""`ldit plot RUN… [--keys …] [--out curves.png]`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ldit.cli.arguments import parse


@dataclass(frozen=True)
class PlotArguments:
    """Draw the curves of runs as one PNG, a panel a key."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Directories of runs, or metrics.jsonl files."""
    keys: tuple[str, ...] = ()
    """What to draw; default loss, eps_mse, grad_norm, lr and images_per_second, where logged. attention_logit/3 is the
    fourth of a list."""
    out: Path = Path("curves.png")
    """The PNG; replaced if it exists."""
    x: Literal["step", "images", "hours"] = "step"
    """Horizontal axis; hours are those of training alone, without samples and measurements. images and hours
    need RUN/config.json beside the metrics."""
    smooth: float = 0.7
    """The line is the mean of the logged values around each, weighted F^distance; in [0, 1), 0 = as logged."""
    log_y: bool = False
    """Logarithmic values."""


def run(arguments: list[str]) -> int:
    args = parse(PlotArguments, arguments, "ldit plot")
    from ldit.commands.plot import PlotJob, plot

    print(plot(PlotJob(args.runs, args.out, args.keys, args.x, args.smooth, args.log_y)))
    return 0
