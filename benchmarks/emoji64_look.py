"""An early look at what the bundled model should be: emoji64 at equal images, in five ways.

    python benchmarks/emoji64_look.py run --work FOLDER [--arms A …]      # goes on where it was stopped
    python benchmarks/emoji64_look.py table [--markdown F.md]

Every arm is trained on 473,600 images, as the bundled model was, in bf16 with compiled blocks; then 324 images with the
labels of the held-out ones are measured against the training images, as in docs/evaluate.md: Fréchet distance in 64
principal components of EfficientNet-Lite0's features with its interval, precision and recall; UniPC-2 on the Karras
grid, 20 evaluations, guidance 3. `run` appends one JSON line an arm to benchmarks/results/emoji64-look.jsonl and writes
its grid of samples beside it. One seed: this is a look, not a ranking.
"""

import argparse
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from emoji64_quality import real_images
from json_lines import append_line, read_lines

import ldit
from ldit.codecs.pixels import labelled_grid
from ldit.config.model import ClassModelConfig
from ldit.config.presets import preset
from ldit.config.recipes.registry import diffusion_recipe
from ldit.config.requests.evaluate import EvaluateRequest
from ldit.config.run import RunConfig
from ldit.config.sections import OptimConfig
from ldit.eval.evaluate import evaluate_with
from ldit.eval.extractors.extractor import LITE0, open_extractor
from ldit.nn.build import forward_flops, parameter_count
from ldit.parallel.world import World
from ldit.storage.signals import Stopped

RESULTS = Path(__file__).parent / "results"
LINES = RESULTS / "emoji64-look.jsonl"
CPU = torch.device("cpu")
SAMPLER: dict[str, Any] = {"solver": "unipc2", "grid": "karras", "steps": "20", "guidance": 3.0}
COMPONENTS, RESAMPLES, ROWS = 64, 1000, 4


def pixels() -> RunConfig:
    """The bundled model's recipe: pixels at patch 8."""
    config = diffusion_recipe("emoji64-class-xs")
    train = replace(config.train, precision="bf16", keep=1, sample_every=0)
    return replace(config, train=train, parallel=replace(config.parallel, compile=True))


def latents() -> RunConfig:
    """Latents of the bundled autoencoder at patch 2, the velocity predicted, rate 1e-3."""
    config, base = diffusion_recipe("emoji64-latent-s"), pixels()
    model = preset("XS", input_size=16, num_classes=9, learn_sigma=False, qk_norm=True, rope="2d")
    return replace(
        config, model=model, train=replace(base.train, lr=1e-3), ema=base.ema, parallel=base.parallel,
        heldout=base.heldout,
    )  # fmt: skip


def large(config: RunConfig) -> ClassModelConfig:
    """The configuration's network, a Large-DiT."""
    assert isinstance(config.model, ClassModelConfig)
    return config.model


def levels() -> RunConfig:
    """Two patch levels: four blocks at patch 8, two at patch 4."""
    config = pixels()
    return replace(config, model=replace(large(config), patch_size=4, fine_layers=2))


def tokens() -> RunConfig:
    """16 class tokens and one adaLN for all blocks, with two more blocks for the parameters that it frees."""
    config = pixels()
    return replace(config, model=replace(large(config), class_tokens=16, shared_adaln=True, n_layers=8))


def muon() -> RunConfig:
    """Chunked Muon at twice the rate."""
    config = pixels()
    optim = OptimConfig("muon", beta2=0.95, chunked=True, precision="bf16")
    return replace(config, optim=optim, train=replace(config.train, lr=1e-3))


ARMS: dict[str, Callable[[], RunConfig]] = {
    "pixels": pixels, "latents": latents, "tokens": tokens, "muon": muon, "levels": levels,
}  # fmt: skip


def known() -> dict[str, dict[str, Any]]:
    return {row["arm"]: row for row in read_lines(LINES)}


def run(args: argparse.Namespace) -> None:
    """Train and measure every arm that is not in the file."""
    extractor = open_extractor(LITE0, None, CPU)
    labels = real_images()[1][1].tolist()
    for name in args.arms:
        if name in known():
            continue
        config, out = ARMS[name](), args.work / name
        ldit.train(config, out)
        request = EvaluateRequest(
            source=str(out), reference="emoji64@train", class_labels=tuple(map(str, labels)), num=len(labels),
            batch_size=54, components=COMPONENTS, bootstrap=RESAMPLES, **SAMPLER,
        )  # fmt: skip
        report = evaluate_with(request, extractor, World(CPU))
        metric = f"{extractor.metric}_{COMPONENTS}"
        side = config.model.input_size
        heldout = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        row = {
            "arm": name, "what": (ARMS[name].__doc__ or "").strip(),
            "images": config.train.steps * config.train.batch_size,
            "parameters": parameter_count(config.model), "gflop": forward_flops(config.model, side, side) / 1e9,
            "fd": report[metric], "fd_interval": report[f"{metric}_interval"],
            **{key: report[key] for key in ("precision", "recall", "kid", "evaluations")},
            "heldout": next(line["eps_mse"] for line in reversed(heldout) if "eps_mse" in line),
            "versions": {"ldit": ldit.__version__, "torch": torch.__version__, "python": platform.python_version()},
            "date": datetime.now(UTC).date().isoformat(),
        }  # fmt: skip
        pipe = ldit.load(out)
        names = pipe.spec.class_names or ()
        chosen = [label for label in range(9) for _ in range(ROWS)]
        images = pipe.sample(chosen, seed=0, **{**SAMPLER, "steps": 20})
        labelled_grid(images, [names[label] for label in chosen]).save(RESULTS / f"emoji64-look-{name}.png")
        append_line(LINES, row)
        print(f"{name}: FD {row['fd']:.1f}", flush=True)


def table(args: argparse.Namespace) -> None:
    """The arms in Markdown."""
    lines = ["| arm | parameters | GFLOP | FD, 95 % | precision | recall | held-out |", "|---|---|---|---|---|---|---|"]
    for row in known().values():
        low, high = row["fd_interval"]
        lines.append(
            f"| {row['arm']}: {row['what']} | {row['parameters'] / 1e6:.1f}M | {row['gflop']:.2f} | "
            f"{row['fd']:.1f} ({low:.1f} to {high:.1f}) | {row['precision']:.2f} | {row['recall']:.2f} | "
            f"{row['heldout']:.3f} |"
        )
    text = "\n".join(lines) + "\n"
    print(text)
    if args.markdown:
        args.markdown.write_text(text, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for function in (run, table):
        one = commands.add_parser(function.__name__, help=(function.__doc__ or "").split(".")[0])
        one.set_defaults(function=function)
        one.add_argument("--work", type=Path, required=function is run, help="folder of the runs")
        one.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
        one.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    try:
        args.function(args)
    except Stopped as stopped:
        return stopped.code
    return 0


if __name__ == "__main__":
    sys.exit(main())
