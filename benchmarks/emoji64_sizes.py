"""A model trained at 64x64 sampled at other sizes: 2-D and raster RoPE, with and without scaled positions.

    python benchmarks/emoji64_sizes.py [--model SOURCE ...] [--page PAGE.png] [--classifier FILE --num 180]

--page is an image: rows are size x model x scaling, columns the nine classes, image k of every row from seed k.
With --classifier (from emoji64_quality.py) each row is also judged on --num images of all classes in turn: the share
of them that the classifier, which knows 64x64 only, gives the class asked for, when it sees the whole image squeezed
to 64x64 and when it sees the square in its middle. It rewards one object in the frame, as the training images are.

A second model with another kind of positions, for comparison, can be had from the bundled one in a while:

    ldit train emoji64-class-xs --out RUN --train.init-from emoji64-class-xs --model.rope raster --train.steps 310
        --train.warmup 25 --train.cooldown 120 --ema.decay 0.99

The last line of stdout is one JSON object.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from emoji64_classifier import SIDE, load_classifier, probabilities
from PIL import Image, ImageDraw, ImageFont

import ldit
from ldit.errors import LditError
from ldit.pipeline.load import Pipeline, load
from ldit.sampling.resolution import SCALINGS

PROPORTIONAL = "+proportional"
ROWS = [*SCALINGS, f"time-aware{PROPORTIONAL}"]
BATCH = 36
MARGIN, GAP = 230, 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["emoji64-class-xs"])
    parser.add_argument("--sizes", nargs="+", default=["64x96", "96x96"], help="height x width in pixels")
    parser.add_argument("--scalings", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--solver", help="default the model's own, as are the steps")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--classifier", type=Path)
    parser.add_argument("--num", type=int, default=180, help="images judged a row")
    parser.add_argument("--size", choices=["full", "tiny"], default="full", help="tiny: one step, for tests")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--page", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.size == "tiny":
        args.sizes, args.solver, args.steps, args.num = args.sizes[:1], "euler", 1, 9
    try:
        report = measure(args)
    except (LditError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    text = json.dumps(report)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")
    print(text)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    pipes = [load(source, args.device) for source in args.model]
    wanted = {"solver": args.solver, "steps": args.steps}
    settings = {key: value for key, value in wanted.items() if value is not None}
    shown: list[tuple[str, list[Image.Image]]] = []
    rows = []
    for height, width in [(SIDE, SIDE), *(tuple(map(int, size.split("x"))) for size in args.sizes)]:
        for pipe in pipes:
            for name in ROWS[:1] if (height, width) == (SIDE, SIDE) else args.scalings:
                scaling, proportional = name.removesuffix(PROPORTIONAL), name.endswith(PROPORTIONAL)
                row = {"size": f"{height}x{width}", "rope": pipe.spec.model.rope}  # type: ignore[union-attr]
                row |= {"scaling": scaling, "proportional": proportional}
                asked = settings | {"rope_scaling": scaling, "proportional_attention": proportional}
                images, seconds = pictures(pipe, args.num if args.classifier else 9, height, width, asked)
                judged = judge(args.classifier, images) if args.classifier else {}
                rows.append(row | judged | {"seconds": round(seconds, 2)})
                shown.append((caption(row), images[:9]))
                print(f"{shown[-1][0]:38s} {json.dumps(judged)}", flush=True)
    if args.page:
        page(shown, pipes[0].spec.class_names or ()).save(args.page)
    defaults = pipes[0].spec.sampling_defaults
    return {
        "benchmark": "emoji64-sizes",
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {"ldit": ldit.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "models": [{"rope": p.spec.model.rope, "training": p.spec.training} for p in pipes],  # type: ignore[union-attr]
        "sampling": {"solver": defaults.solver, "steps": defaults.steps, "guidance": defaults.guidance} | settings,
        "judged": args.num if args.classifier else 0,
        "rows": rows,
    }


def pictures(
    pipe: Pipeline, num: int, height: int, width: int, settings: dict[str, Any]
) -> tuple[list[Image.Image], float]:
    """Image k has class k mod 9 and seed k."""
    started = time.perf_counter()
    labels = [k % 9 for k in range(num)]
    images = pipe(class_labels=labels, seed=0, height=height, width=width, batch_size=BATCH, **settings)
    return images, time.perf_counter() - started


def judge(classifier: Path, images: Sequence[Image.Image]) -> dict[str, Any]:
    """Shares of right answers on whole images and on the squares in their middle, with their standard errors."""
    network, _ = load_classifier(classifier)
    found: dict[str, Any] = {}
    labels = torch.arange(len(images)) % 9
    for name, cut in (("whole", False), ("middle", True)):
        array = np.stack([np.asarray(seen(image, cut)) for image in images])
        answers = probabilities(network, torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()).argmax(-1)
        share = float((answers == labels).double().mean())
        error = (share * (1 - share) / len(images)) ** 0.5
        found[name] = {"accuracy": round(share, 4), "standard_error": round(error, 4)}
    return found


def seen(image: Image.Image, cut: bool) -> Image.Image:
    """What the classifier is shown, 64x64."""
    if cut:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    return image if image.size == (SIDE, SIDE) else image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def caption(row: dict[str, Any]) -> str:
    names = {"2d": "2-D", "raster": "raster"}
    scaling = {"none": "as trained"}.get(row["scaling"], row["scaling"])
    return f"{row['size']}  {names[row['rope']]}, {scaling}{', proportional' if row['proportional'] else ''}"


def page(rows: Sequence[tuple[str, Sequence[Image.Image]]], names: Sequence[str]) -> Image.Image:
    """A line of images for each row, its caption on the left, classes above."""
    font = ImageFont.load_default(size=13)
    width = max(image.width for _, images in rows for image in images) + GAP
    tops = [24]
    for _, images in rows:
        tops.append(tops[-1] + images[0].height + GAP)
    canvas = Image.new("RGB", (MARGIN + 9 * width, tops[-1]), "white")
    draw = ImageDraw.Draw(canvas)
    for column, name in enumerate(names):
        draw.text((MARGIN + column * width + width // 2, 5), name, fill="black", font=font, anchor="ma")
    for (text, images), top in zip(rows, tops, strict=False):
        draw.text((4, top + images[0].height // 2), text, fill="black", font=font, anchor="lm")
        for column, image in enumerate(images):
            canvas.paste(image, (MARGIN + column * width, top))
    return canvas


if __name__ == "__main__":
    main()
