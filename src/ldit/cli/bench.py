"""`ldit bench train [--size 600m …] [--json FILE]`, `ldit bench sample [--size 600m --batch 1 8 …] [--json FILE]`."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ldit.cli.arguments import parse
from ldit.config.sections import Precision, Recompute
from ldit.errors import ConfigError


@dataclass(frozen=True)
class BenchArguments:
    """Flags of `ldit bench train`."""

    size: Literal["tiny", "600m", "3b", "7b"] = "600m"
    """Network."""
    batch: int = 64
    """Images a step."""
    micro: int | None = None
    """Images in one pass; default the batch."""
    precision: Precision = "bf16"
    """Precision policy."""
    variants: tuple[Literal["original", "fused", "compiled"], ...] = ("original", "fused", "compiled")
    """Forms of the step: as the original takes it, ours, ours with compiled blocks."""
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


@dataclass(frozen=True)
class BenchSampleArguments:
    """Flags of `ldit bench sample`."""

    size: Literal["tiny", "600m", "3b", "7b"] = "600m"
    """Network."""
    batch: tuple[int, ...] = (1, 8)
    """Images at once, one measurement each."""
    steps: int = 20
    """Grid intervals."""
    solver: str = "unipc2"
    """Solver, as `ldit sample` knows them."""
    guidance: float = 4.0
    """Guidance scale; 1 = no guided rows."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Default: fp32 on the CPU, bf16 on a GPU."""
    int8: bool = False
    """8-bit products, CPU only."""
    compile: bool = False
    """Compile the blocks."""
    graphs: Annotated[bool, tyro.conf.arg(aliases=("--graph",))] = False
    """Each evaluation as one CUDA graph (GPU)."""
    host_modulation: bool = False
    """Keep the adaLN weights on the host."""
    rounds: int = 3
    """Rounds."""
    device: Literal["cpu", "cuda"] | None = None
    """Default: the GPU where there is one."""
    json: Path | None = None
    """File for the report; it is the last line of stdout too."""


def run(arguments: list[str]) -> int:
    theme = arguments[0] if arguments and not arguments[0].startswith("-") else None
    if theme not in (*THEMES, None) or (theme is None and not {"-h", "--help"} & set(arguments)):
        raise ConfigError(f"ldit bench needs a theme: {' or '.join(THEMES)} (got {theme!r})")
    kind, measure = THEMES[theme or "train"]
    parsed = parse(kind, arguments[1:] if theme else arguments, f"ldit bench {theme or 'train'}", __doc__)
    for name in ("batch", "steps", "rounds"):
        value = getattr(parsed, name)
        least = min(value, default=0) if isinstance(value, tuple) else value
        if least < 1:
            raise ConfigError(f"--{name}: must be at least 1, got {least}")
    from ldit.bench.train_step import check_report
    from ldit.log import setup

    if parsed.json is not None:
        check_report(parsed.json)
    setup()
    report = json.dumps(measure(parsed))
    print(report, flush=True)  # first: the file may fail
    if parsed.json is not None:
        parsed.json.write_text(report + "\n", encoding="utf-8")
    return 0


def _train(parsed: BenchArguments) -> dict[str, Any]:
    if parsed.micro is not None and (parsed.micro < 1 or parsed.batch % parsed.micro):
        raise ConfigError(f"--micro: {parsed.micro} does not divide the batch {parsed.batch}")
    from ldit.bench.train_step import Job, bench_train

    return bench_train(
        Job(
            parsed.size, parsed.batch, parsed.micro, parsed.precision, parsed.variants, parsed.steps, parsed.rounds,
            parsed.recompute, parsed.ema, parsed.device,
        )
    )  # fmt: skip


def _sample(parsed: BenchSampleArguments) -> dict[str, Any]:
    from ldit.bench.sampling import SampleJob, bench_sample

    return bench_sample(
        SampleJob(
            parsed.size, parsed.batch, parsed.steps, parsed.solver, parsed.guidance, parsed.dtype, None, parsed.int8,
            parsed.compile, parsed.graphs, parsed.host_modulation, parsed.rounds, parsed.device,
        )
    )  # fmt: skip


THEMES: dict[str, tuple[type[Any], Callable[[Any], dict[str, Any]]]] = {
    "train": (BenchArguments, _train),
    "sample": (BenchSampleArguments, _sample),
}
