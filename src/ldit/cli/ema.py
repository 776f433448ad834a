"""`ldit ema RUN OUT --sigma-rel S`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ldit.cli.arguments import parse


@dataclass(frozen=True)
class EMAArguments:
    """Make the average of another width from the snapshots of a run (post-hoc EMA, Karras et al. 2024)."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run trained with --ema.power 0.05 0.10 --ema.snapshot-every N."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder that does not exist yet."""
    sigma_rel: float
    """Relative width of the average: its deviation in time as a share of the training, above 0 and below 0.28."""
    step: int | None = None
    """Step of the snapshot at which the average ends; default the last."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Dtype of the weights written."""


def run(arguments: list[str]) -> int:
    args = parse(EMAArguments, arguments, "ldit ema")
    from ldit.train.reconstruct import reconstruct

    made = reconstruct(args.run, args.out, args.sigma_rel, args.step, args.dtype)
    print(
        f"width {made.sigma_rel:g} at step {made.step} from {made.sets} averages of {made.snapshots} snapshots: "
        f"profile residual {made.residual:.1e}, coefficients' magnitudes sum to {made.magnitude:.1f}"
    )
    print(made.out)
    return 0
