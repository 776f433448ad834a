"""Does the norm of queries and keys keep training stable at high rates and in low precision?

    python benchmarks/stability.py run [--results FILE.jsonl]      # the whole grid; goes on where it was stopped
    python benchmarks/stability.py table [--results FILE.jsonl] [--markdown F.md] [--figure F.png]

Large-DiT as published (eps, learned variance, AdamW, clip at 2, no warm-up) at width 128 with 4 blocks, on emoji64 at
32 pixels (64 tokens), 200 steps of 32 images. Arms differ in the norm of queries and keys alone: none; full, a
LayerNorm over the whole width (the original); head, an RMSNorm of each head. Precisions: fp32; bf16, as `ldit train`
has it; fp16 emulated: the outputs of every linear layer and norm are rounded to fp16, gradients are not.

A run counts as failed when a loss or gradient is not finite, or when the mean loss of the last 20 steps is above 0.5:
an output of zero has a loss of about 1, and runs that learn end near 0.1. Every 20 steps the largest attention logit of
all layers is recorded, on two images.
"""

import argparse
import math
import platform
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any, Literal, NamedTuple

import torch
from json_lines import append_line, read_lines
from torch import Tensor, nn

import ldit
from ldit.config.model import ClassModelConfig
from ldit.config.recipes.registry import diffusion_recipe
from ldit.config.run import RunConfig
from ldit.config.spec import ClassConditionerConfig, DDPMConfig, ModelSpec
from ldit.data.loader import Loader, load_batch
from ldit.data.source import open_data
from ldit.figure import COLOURS, figure_bytes, new_figure, style
from ldit.nn.layers import RMSNorm
from ldit.parallel.world import World
from ldit.precision import COMPUTE
from ldit.training.hooks import eager
from ldit.training.step import fill_fresh, new_state, train_step
from ldit.training.tasks.diffusion import DiffusionTask
from ldit.training.telemetry import largest_logits

RESULTS = Path(__file__).parent / "results" / "stability.jsonl"
NORMS: dict[str, bool | Literal["head"]] = {"none": False, "full": True, "head": "head"}
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
PRECISIONS = ("fp32", "bf16", "fp16 emulated")
SEEDS = (0, 1, 2)
STEPS, BATCH, SIDE, LOOK = 200, 32, 32, 20
ALONE = World(torch.device("cpu"))


class Run(NamedTuple):
    precision: str
    norm: str
    rate: float
    seed: int


def grid() -> Iterator[Run]:
    """All runs; the first seed of everything first."""
    for seed, precision, rate, norm in product(SEEDS, PRECISIONS, RATES, NORMS):
        yield Run(precision, norm, rate, seed)


def configured(run: Run) -> RunConfig:
    config = diffusion_recipe("tiny-cpu")
    model = ClassModelConfig(
        dim=128, n_layers=4, n_heads=4, multiple_of=32, input_size=SIDE, patch_size=4, in_channels=3, num_classes=9,
        qk_norm=NORMS[run.norm],
    )  # fmt: skip
    train = replace(
        config.train, steps=STEPS, batch_size=BATCH, lr=run.rate, seed=run.seed,
        precision="bf16" if run.precision == "bf16" else "fp32",
    )  # fmt: skip
    data = replace(config.data, image_size=SIDE, max_per_class=300)
    return replace(config, model=model, process=DDPMConfig(), train=train, data=data)


class _ToHalf(torch.autograd.Function):
    """Rounds to fp16; gradients pass unchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.half().to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0]


def emulate_half(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.LayerNorm, RMSNorm)):
            module.register_forward_hook(lambda module, args, out: _ToHalf.apply(out))


def trained(run: Run) -> dict[str, Any]:
    """The result of a run: first and last losses until it failed, and the largest logits."""
    config = configured(run)
    data, _ = open_data(config.data.path, SIDE, config.data.heldout, config.data.max_per_class)
    task = DiffusionTask(
        config, ModelSpec(config.model, config.process, config.codec, ClassConditionerConfig(data.names))
    )
    state = new_state(config, task, ALONE)
    fill_fresh(state, task)
    if run.precision.startswith("fp16"):
        emulate_half(state.weights.model)
    probe = load_batch(data, [0, 1], [0, len(data) // 2], None)
    dtype, losses, logits = COMPUTE[config.train.precision], [], []

    def look() -> None:
        with torch.no_grad(), eager():
            task.evaluate(state.weights.model, probe, ALONE.device, dtype)

    fault = ""
    for batch in Loader(data, BATCH, run.seed, False, 0).from_step(0, STEPS):
        outcome = train_step(state, task, batch)
        losses.append(outcome.values["loss"])
        fault = outcome.fault
        if fault:
            break
        if state.step % LOOK == 0:
            logits.append(max(largest_logits(state.weights.model, look, ALONE)))
    return {
        **run._asdict(), "fault": fault, "steps": len(losses),
        "first": mean(losses[:5]), "last": mean(losses[-20:]) if not fault else None,
        "logits": [round(value, 2) if math.isfinite(value) else None for value in logits],
    }  # fmt: skip


def known(file: Path) -> dict[Run, dict[str, Any]]:
    return {Run(row["precision"], row["norm"], row["rate"], row["seed"]): row for row in read_lines(file)}


def run(args: argparse.Namespace) -> None:
    """Train every run of the grid that is not in the file."""
    done = known(args.results)
    versions = {"ldit": ldit.__version__, "torch": torch.__version__, "python": platform.python_version()}
    for one in grid():
        if one in done or one.seed not in args.seeds:
            continue
        row = trained(one) | {"versions": versions, "date": datetime.now(UTC).date().isoformat()}
        append_line(args.results, row)
        print(one, "failed" if failed(row) else f"{row['last']:.4f}", flush=True)


def failed(row: dict[str, Any]) -> bool:
    return bool(row["fault"]) or row["last"] > 0.5


def table(args: argparse.Namespace) -> None:
    """How many runs failed, by precision, norm and rate, and the largest attention logits."""
    rows = known(args.results)
    rates = " | ".join(f"{rate:g}" for rate in RATES)
    lines = [f"| precision | q/k norm | {rates} | largest logit, learnt | failed |", "|---" * (len(RATES) + 4) + "|"]
    for precision, norm in product(PRECISIONS, NORMS):
        every = [row for row in rows.values() if (row["precision"], row["norm"]) == (precision, norm)]
        cells = []
        for rate in RATES:
            own = [row for row in every if row["rate"] == rate]
            final = [row["last"] for row in own if not failed(row)]
            words = f"{sum(map(failed, own))} of {len(own)}" + (f" ({mean(final):.3f})" if final else "")
            cells.append(words if own else "-")
        for is_failed in (False, True):
            logits = [v for row in every if failed(row) is is_failed for v in row["logits"] if v is not None]
            cells.append(f"{max(logits):,.0f}" if logits else "-")
        lines.append(f"| {precision} | {norm} | " + " | ".join(cells) + " |")
    text = "\n".join(lines) + "\n"
    print(text)
    if args.markdown:
        args.markdown.write_text(text, encoding="utf-8")
    if args.figure:
        draw(rows, args.figure)


@style()
def draw(rows: dict[Run, dict[str, Any]], file: Path) -> None:
    """A panel a precision: failed runs by rate above, the largest logit over steps below."""
    figure = new_figure(11, 6)
    axes = figure.subplots(2, len(PRECISIONS), sharey="row")
    for column, precision in enumerate(PRECISIONS):
        top, bottom = axes[0, column], axes[1, column]
        for norm, colour in zip(NORMS, COLOURS, strict=False):
            own = [row for row in rows.values() if (row["precision"], row["norm"]) == (precision, norm)]
            shares = [mean(failed(row) for row in own if row["rate"] == rate) for rate in RATES
                      if any(row["rate"] == rate for row in own)]  # fmt: skip
            top.plot(RATES[: len(shares)], shares, marker="o", color=colour, label=f"q/k norm: {norm}")
            for row in own:
                values = [value if value is not None else math.nan for value in row["logits"]]
                bottom.plot([LOOK * (i + 1) for i in range(len(values))], values, color=colour, alpha=0.35, linewidth=1)
        top.set(title=precision, xscale="log", xlabel="learning rate", ylim=(-0.05, 1.05))
        bottom.set(yscale="log", xlabel="step")
        top.xaxis.set_major_formatter(lambda value, place: f"{value:g}")
        bottom.yaxis.set_major_formatter(lambda value, place: f"{value:g}")
    axes[0, 0].set_ylabel("share of runs that failed")
    axes[1, 0].set_ylabel("largest attention logit")
    axes[0, 0].legend()
    file.write_bytes(figure_bytes(figure, file.suffix[1:]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for function in (run, table):
        one = commands.add_parser(function.__name__, help=(function.__doc__ or "").split(".")[0])
        one.set_defaults(function=function)
        one.add_argument("--results", type=Path, default=RESULTS)
        one.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="for several processes at once")
        one.add_argument("--markdown", type=Path)
        one.add_argument("--figure", type=Path)
    args = parser.parse_args()
    args.function(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
