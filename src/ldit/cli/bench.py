"""`ldit bench train [--size 600m …] [--json FILE]`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ldit.cli.arguments import parse
from ldit.config.sections import Precision, Recompute
from ldit.errors import ConfigError


@dataclass(frozen=True)
class BenchArguments:
    """Flags of `ldit bench train`."""

    size: Literal["tiny", "600m", "3b", "7b"] = "600m"
    """Network."""
    batch: int = 64
    """Pictures a step."""
    micro: int | None = None
    """Pictures in one pass; default the batch."""
    precision: Precision = "bf16"
    """Precision policy."""
    rungs: tuple[Literal["original", "fused", "compiled"], ...] = ("original", "fused", "compiled")
    """Rungs of the ladder."""
    steps: int = 5
    """Steps in a round."""
    rounds: int = 3
    """Rounds."""
    recompute: Recompute = "none"
    """Activations made again in the backward pass."""
    ema: bool = True
    """Keep a moving average, as training does."""
    device: Literal["cpu", "cuda"] | None = None
    """Default: the GPU where there is one."""
    json: Path | None = None
    """File for the report; it is the last line of stdout too."""


def run(arguments: list[str]) -> int:
    theme = arguments[0] if arguments and not arguments[0].startswith("-") else None
    if theme not in ("train", None) or (theme is None and not {"-h", "--help"} & set(arguments)):
        raise ConfigError(f"ldit bench needs a theme: train (got {theme!r})")
    parsed = parse(BenchArguments, arguments[1:] if theme else arguments, "ldit bench train", __doc__)
    for name in ("batch", "steps", "rounds"):
        if getattr(parsed, name) < 1:
            raise ConfigError(f"--{name}: must be at least 1, got {getattr(parsed, name)}")
    if parsed.micro is not None and (parsed.micro < 1 or parsed.batch % parsed.micro):
        raise ConfigError(f"--micro: {parsed.micro} does not divide the batch {parsed.batch}")
    from ldit.flows.bench import Job, bench_train, check_report
    from ldit.log import setup

    if parsed.json is not None:
        check_report(parsed.json)
    setup()
    job = Job(
        parsed.size, parsed.batch, parsed.micro, parsed.precision, parsed.rungs, parsed.steps, parsed.rounds,
        parsed.recompute, parsed.ema, parsed.device,
    )  # fmt: skip
    report = json.dumps(bench_train(job))
    print(report, flush=True)  # first: the file may fail
    if parsed.json is not None:
        parsed.json.write_text(report + "\n", encoding="utf-8")
    return 0
