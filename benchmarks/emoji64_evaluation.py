"""Evaluation on emoji64: does a distance order what everybody orders, and does it cost more than its extractor?

    python benchmarks/emoji64_evaluation.py order [--components 64] [--resamples 1000] [--figure F.png] [--json F]
    python benchmarks/emoji64_evaluation.py speed [--num 10000] [--json F]

order: held-out images, images of the bundled model (the same labels), and noise, as many of each, against the
       training images, in EfficientNet-Lite0's features: Fréchet distance in principal components fixed on the
       training images, with a 95 % bootstrap interval, and KID. The figure shows both.
speed: images of 64 px from an .npz through features and all figures, against the extractor alone on blocks in memory,
       the median of three rounds before and three after; where those are more than a tenth apart other work was in the
       way and the share says nothing. Beside it the share of the time that was spent in the extractor. Reference
       images go through the features too, and count.

The last line of stdout is one JSON object.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from emoji64_quality import real_images
from matplotlib.figure import Figure

import ldit
from ldit.config.requests.evaluate import EvaluateRequest
from ldit.eval.evaluate import evaluate_with
from ldit.eval.extractors.extractor import LITE0, open_extractor
from ldit.eval.features import Extractor, Features
from ldit.figure import COLOURS, figure_bytes, new_figure, style
from ldit.parallel.world import World
from ldit.training.telemetry import peak_memory

MODEL, TRAINING, HELDOUT = "emoji64-class-xs", "emoji64@train", "emoji64@heldout"
SIDE, BLOCK, ROUNDS = 64, 50, 3
KEPT = ("kid", "kid_deviation", "precision", "recall", "num_samples", "evaluations", "labels")
ALONE = World(torch.device("cpu"))


def order(args: argparse.Namespace, extractor: Extractor, place: Path) -> dict[str, Any]:
    labels = real_images()[1][1].tolist()
    random = np.random.default_rng(0)
    np.savez(place / "noise.npz", random.integers(0, 256, (len(labels), SIDE, SIDE, 3), dtype=np.uint8))
    sources: dict[str, dict[str, Any]] = {
        "held-out images": {"source": HELDOUT},
        "bundled model": {"source": MODEL, "class_labels": tuple(map(str, labels)), "num": len(labels)},
        "noise": {"source": str(place / "noise.npz")},
    }
    settings: dict[str, Any] = {"batch_size": BLOCK, "components": args.components, "bootstrap": args.resamples}
    name = f"{extractor.metric}_{args.components}"
    rows = []
    for what, images in sources.items():
        report = evaluate_with(EvaluateRequest(reference=TRAINING, **images, **settings), extractor, ALONE)
        found = {key: report[key] for key in KEPT}
        rows.append({"pictures": what, "fd": report[name], "fd_interval": report[f"{name}_interval"], **found})
        print(f"{what}: {rows[-1]}", file=sys.stderr)
    apart = all(a["fd_interval"][1] < b["fd_interval"][0] for a, b in pairwise(rows))
    kid = all(a["kid"] < b["kid"] for a, b in pairwise(rows))
    if args.figure:
        args.figure.write_bytes(figure_bytes(draw(rows, args.components), args.figure.suffix[1:]))
    return {"components": args.components, "resamples": args.resamples, "rows": rows,
            "intervals_apart_and_rising": apart, "kid_rising": kid}  # fmt: skip


def speed(args: argparse.Namespace, extractor: Extractor, place: Path) -> dict[str, Any]:
    training = real_images()[0][0]
    random = torch.Generator().manual_seed(0)
    chosen = training[torch.randint(len(training), (args.num,), generator=random)].permute(0, 2, 3, 1).numpy()
    np.savez(place / "pictures.npz", chosen ^ 1)  # the last bit of each value turned
    blocks = training[: 8 * BLOCK].split(BLOCK)

    def alone() -> float:
        began = time.perf_counter()
        for block in blocks:
            extractor(block)
        return 8 * BLOCK / (time.perf_counter() - began)

    alone()
    raw = [alone() for _ in range(ROUNDS)]
    job = EvaluateRequest(source=str(place / "pictures.npz"), reference=TRAINING, batch_size=BLOCK)
    timed = Timed(extractor)
    began = time.perf_counter()
    report = evaluate_with(job, timed, ALONE)
    seconds = time.perf_counter() - began
    raw += [alone() for _ in range(ROUNDS)]
    rate = (args.num + len(training)) / seconds
    return {
        "pictures": args.num, "reference_pictures": len(training), "seconds": seconds, "pictures_per_second": rate,
        "extractor_alone": raw, "steady": max(raw) <= 1.1 * min(raw), "share": rate / median(raw),
        "share_in_extractor": timed.seconds / seconds, "peak_memory": peak_memory(ALONE.device),
        "figures": {name: report[name] for name in report["figures"]},
    }  # fmt: skip


class Timed:
    """An extractor and the seconds spent in it."""

    def __init__(self, extractor: Extractor) -> None:
        self.extractor, self.seconds = extractor, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.extractor, name)

    def __call__(self, images: torch.Tensor) -> Features:
        began = time.perf_counter()
        found = self.extractor(images)
        self.seconds += time.perf_counter() - began
        return found


@style()
def draw(rows: list[dict[str, Any]], components: int) -> Figure:
    """Two panels of bars, a bar a set: the distance with its interval, and KID with its deviation."""
    figure = new_figure(10.8, 1.2 + 0.5 * len(rows))
    panels = (
        (f"FD-{LITE0}, {components} components, 95 %", "fd", [row["fd_interval"] for row in rows]),
        (
            "KID ± deviation of subsets",
            "kid",
            [(r["kid"] - r["kid_deviation"], r["kid"] + r["kid_deviation"]) for r in rows],
        ),
    )
    for axes, colour, (title, key, spread) in zip(
        figure.subplots(1, 2, sharey=True), COLOURS[::2], panels, strict=False
    ):
        values = [row[key] for row in rows]
        errors = [[v - low for v, (low, _) in zip(values, spread, strict=True)],
                  [high - v for v, (_, high) in zip(values, spread, strict=True)]]  # fmt: skip
        bars = axes.barh([row["pictures"] for row in rows], values, 0.7, xerr=errors, color=colour)
        axes.bar_label(bars, [f"{value:.3g}" for value in values], padding=5)
        axes.margins(x=0.12)
        axes.grid(False, axis="y")
        axes.set_title(title)
    figure.axes[0].invert_yaxis()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    themes = {"order": order, "speed": speed}
    parser.add_argument("theme", choices=themes)
    parser.add_argument("--components", type=int, default=64)
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--num", type=int, default=10_000)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    extractor = open_extractor(LITE0, None, ALONE.device)
    with tempfile.TemporaryDirectory() as place:
        result = themes[args.theme](args, extractor, Path(place))
    report = {
        "benchmark": f"evaluation-{args.theme}",
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {"ldit": ldit.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "threads": torch.get_num_threads(),
        "extractor": extractor.name,
        "extractor_sha256": extractor.fingerprint,
        "resize": extractor.resize,
        **result,
    }
    if args.json:
        args.json.write_text(json.dumps(report) + "\n", encoding="utf-8")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
