"""How good emoji64 samples are: a classifier's opinion of their class, and their nearest training images.

    python benchmarks/emoji64_quality.py classifier --out FILE.safetensors
    python benchmarks/emoji64_quality.py accuracy --model SOURCE --classifier FILE [--num 450] [...]
    python benchmarks/emoji64_quality.py neighbours --model SOURCE --out PAGE.png [--num 27] [--classifier FILE]

`accuracy` answers "is it the class that was asked for"; read it beside the classifier's accuracy on held-out real
images (guided samples are more typical than those and may score above it). `neighbours` answers "is it new": each
sample is shown beside the three training images nearest to it. Distance: Euclidean over the image at 64x64 and
its 16x16 box averages joined, each part scaled to weigh the same: d² = (mean squared difference at 64x64 + the same
at 16x16) / 2, values in [-1, 1]. With --classifier it is the Euclidean distance of the classifier's last features
instead. Memorised samples would be much nearer to the training set than held-out real images are; figures for both
are printed, as means over classes, because the class `people` holds the same figures in several skin tones and is
easily near. Blurred or empty samples are near to everything: look at the page too.

The last line of stdout is one JSON object.
"""

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from emoji64_classifier import (
    SIDE,
    EmojiClassifier,
    load_classifier,
    probabilities,
    save_classifier,
    to_input,
    train_classifier,
)
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError
from torch import Tensor

import ldit
from ldit.codecs.conditioners import build_conditioner
from ldit.data.images.image_set import ImageSet
from ldit.data.source import open_data
from ldit.errors import LditError, RequestError
from ldit.nn.build import parameter_count
from ldit.pipeline.generate import Done, Sample
from ldit.pipeline.load import Pipeline, load

SAMPLING_BATCH = 64
NEIGHBOURS = 3


def real_images() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[str, ...]]:
    """Training and held-out (uint8 (N, 3, 64, 64), labels (N,)), all of them, and the class names."""
    train, heldout = open_data("emoji64", SIDE, "heldout.txt")
    assert heldout is not None
    return _stack(train), _stack(heldout), train.names


def _stack(data: ImageSet) -> tuple[Tensor, Tensor]:
    pictures, labels = zip(*(data[i] for i in range(len(data))), strict=True)
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


def class_accuracies(predicted: Tensor, labels: Tensor, classes: int) -> list[float]:
    """Share of right answers by class; NaN for a class without images."""
    right = (predicted == labels).double()
    return [float(right[labels == c].mean()) for c in range(classes)]


def balanced(values: Sequence[float]) -> float:
    """Mean over the classes that have a value."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known)


# --- classifier -------------------------------------------------------------------------------------------------------


def make_classifier(args: argparse.Namespace) -> dict[str, Any]:
    started = time.perf_counter()
    (images, labels), heldout, names = real_images()
    network = train_classifier(images, labels, args.steps, args.batch, args.seed)
    result = {
        "task": "classifier",
        "parameters": sum(p.numel() for p in network.parameters()),
        "heldout": heldout_accuracy(network, heldout, names),
        "train_pictures": len(labels),
        "seed": args.seed,
        "steps": args.steps,
        "batch": args.batch,
        "seconds": round(time.perf_counter() - started, 1),
    }
    metadata = {
        "accuracy": str(result["heldout"]["accuracy"]),
        "balanced_accuracy": str(result["heldout"]["balanced_accuracy"]),
        "seed": str(args.seed),
        "steps": str(args.steps),
        "batch": str(args.batch),
        "torch": torch.__version__,
        "classes": json.dumps(names),
        "data": "emoji64, 64x64, trained without heldout.txt",
    }
    save_classifier(args.out, network, metadata)
    return result


def heldout_accuracy(network: EmojiClassifier, heldout: tuple[Tensor, Tensor], names: Sequence[str]) -> dict[str, Any]:
    """Accuracy on held-out real images, plain and as the mean over classes."""
    images, labels = heldout
    predicted = probabilities(network, images).argmax(-1)
    by_class = class_accuracies(predicted, labels, len(names))
    return {
        "accuracy": round(float((predicted == labels).double().mean()), 4),
        "balanced_accuracy": round(balanced(by_class), 4),
        "per_class": {name: round(value, 4) for name, value in zip(names, by_class, strict=True)},
        "pictures": len(labels),
    }


# --- samples ----------------------------------------------------------------------------------------------------------


def sample(args: argparse.Namespace, names: Sequence[str]) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """(uint8 (N, 3, 64, 64), labels (N,), how they were made); image k has label k mod 9 and seed k."""
    pipe = load(args.model)
    count = build_conditioner(pipe.spec).count
    if count != len(names) or (pipe.spec.class_names or tuple(names)) != tuple(names):
        raise RequestError(f"{args.model}: not a model of the emoji64 classes ({', '.join(names)})")
    labels = [k % count for k in range(args.num)]
    wanted = {"steps": args.steps, "guidance": args.guidance, "guidance_interval": args.guidance_interval}
    overrides = {key: value for key, value in wanted.items() if value is not None}
    images, done = _run(pipe, labels, overrides)
    defaults = pipe.spec.sampling_defaults
    how = {
        "model": _name(pipe, args.model),
        "parameters": parameter_count(pipe.spec.model),
        "picture_size": images[0].size[0],
        "sampling": {
            "solver": defaults.solver,
            "steps": overrides.get("steps", defaults.steps),
            "guidance": overrides.get("guidance", defaults.guidance),
            "guidance_channels": defaults.guidance_channels,
            "guidance_interval": list(overrides.get("guidance_interval", defaults.guidance_interval)),
            "seeds": [0, args.num - 1],
            "batch": SAMPLING_BATCH,
        },
        "pictures": args.num,
        "evaluations": done.evaluations,
        "sampling_seconds": round(done.seconds, 1),
        "device": pipe.device.type,
    }
    resized = [im if im.size == (SIDE, SIDE) else im.resize((SIDE, SIDE), Image.Resampling.BICUBIC) for im in images]
    tensor = torch.from_numpy(np.stack([np.asarray(image) for image in resized])).permute(0, 3, 1, 2).contiguous()
    return tensor, torch.tensor(labels), how


def _name(pipe: Pipeline, asked: str) -> str:
    """Folder and, for a run, its step, without the place on this machine."""
    path = pipe.source
    if path is None:
        return asked
    return f"{path.parent.parent.name}/{path.name}" if path.name.startswith("step-") else path.name


def _run(pipe: Pipeline, labels: list[int], overrides: dict[str, Any]) -> tuple[list[Image.Image], Done]:
    images: list[Image.Image] = []
    done: Done | None = None
    for event in pipe.iterate(labels, seed=0, batch_size=SAMPLING_BATCH, progress=True, **overrides):
        if isinstance(event, Sample) and event.image is not None:
            images.append(event.image)
        elif isinstance(event, Done):
            done = event
    assert done is not None
    return images, done


def measure_accuracy(args: argparse.Namespace) -> dict[str, Any]:
    network, metadata = load_classifier(args.classifier)
    _, heldout, names = real_images()
    images, labels, how = sample(args, names)
    probability = probabilities(network, images)
    predicted = probability.argmax(-1)
    by_class = class_accuracies(predicted, labels, len(names))
    accuracy = float((predicted == labels).double().mean())
    real = heldout_accuracy(network, heldout, names)
    print(f"{'class':12s} {'samples':>8s} {'held-out':>9s}  most frequent wrong answer")
    for c, name in enumerate(names):
        wrong = predicted[(labels == c) & (predicted != c)]
        worst = names[int(wrong.mode().values)] if len(wrong) else "-"
        print(f"{name:12s} {by_class[c]:8.3f} {real['per_class'][name]:9.3f}  {worst}")
    print(f"{'all':12s} {accuracy:8.3f} {real['balanced_accuracy']:9.3f}  (held-out: mean over classes)")
    return {
        "task": "accuracy",
        **how,
        "accuracy": round(accuracy, 4),
        "standard_error": round(math.sqrt(accuracy * (1 - accuracy) / len(labels)), 4),
        "mean_probability": round(float(probability.gather(1, labels[:, None]).mean()), 4),
        "per_class": {n: None if math.isnan(v) else round(v, 4) for n, v in zip(names, by_class, strict=True)},
        "heldout": real,
        "classifier": {key: metadata.get(key) for key in ("accuracy", "balanced_accuracy", "seed", "steps", "torch")},
    }


# --- neighbours -------------------------------------------------------------------------------------------------------


def describe(images: Tensor, network: EmojiClassifier | None) -> Tensor:
    """(N, K) vectors whose Euclidean distance is the one of the module's docstring."""
    with torch.inference_mode():
        if network is not None:
            return torch.cat([network.features(to_input(part)) for part in images.split(256)])
        full = to_input(images)
        parts = (full.flatten(1), F.avg_pool2d(full, SIDE // 16).flatten(1))
        return torch.cat([part / math.sqrt(2 * part.shape[1]) for part in parts], dim=1)


def class_means(values: Tensor, labels: Tensor, names: Sequence[str]) -> dict[str, float]:
    return {n: float(values[labels == c].mean()) for c, n in enumerate(names) if bool((labels == c).any())}


def find_neighbours(args: argparse.Namespace) -> dict[str, Any]:
    network = load_classifier(args.classifier)[0] if args.classifier else None
    train, heldout, names = real_images()
    images, labels, how = sample(args, names)
    known = describe(train[0], network)
    distance, index = torch.cdist(describe(images, network), known).topk(NEIGHBOURS, largest=False)
    real_distance = torch.cdist(describe(heldout[0], network), known).amin(1)
    page((images, labels), train, distance, index, names).save(args.out)
    nearest = distance[:, 0]
    means = {"samples": class_means(nearest, labels, names), "heldout": class_means(real_distance, heldout[1], names)}
    print("mean distance to the nearest training image")
    for name in names:
        print(f"{name:12s} " + "  ".join(f"{who} {table.get(name, math.nan):.4f}" for who, table in means.items()))
    # The same classes on both sides, or the comparison would be one of classes.
    shared = list(means["samples"])
    sample_mean = balanced([means["samples"][name] for name in shared])
    heldout_mean = balanced([means["heldout"][name] for name in shared])
    low = torch.stack([torch.quantile(real_distance[heldout[1] == c], 0.05) for c in range(len(names))])
    return {
        "task": "neighbours",
        **how,
        "page": args.out.name,
        "distance": "classifier features" if network else "pixels 64x64 + 16x16",
        "train_pictures": len(train[1]),
        "sample_nearest_mean": round(sample_mean, 4),
        "heldout_nearest_mean": round(heldout_mean, 4),
        "ratio": round(sample_mean / heldout_mean, 3),
        "sample_nearest_least": round(float(nearest.min()), 4),
        "below_heldout_5_percent": round(float((nearest < low[labels]).double().mean()), 4),
        "per_class": {who: {n: round(v, 4) for n, v in table.items()} for who, table in means.items()},
    }


def page(
    samples: tuple[Tensor, Tensor],
    train: tuple[Tensor, Tensor],
    distance: Tensor,
    index: Tensor,
    names: Sequence[str],
    groups: int = 3,
    scale: int = 2,
) -> Image.Image:
    """One line of `groups` samples, each followed by its neighbours, for every class (more lines where it has more)."""
    side, gap, left, head, foot = SIDE * scale, 6, 110, 58, 20
    group = (1 + NEIGHBOURS) * (side + gap) + 4 * gap
    order = [torch.nonzero(samples[1] == c).flatten().tolist() for c in range(len(names))]
    lines = [(c, rows[i : i + groups]) for c, rows in enumerate(order) for i in range(0, len(rows), groups)]
    columns = max(len(rows) for _, rows in lines)
    canvas = Image.new("RGB", (left + columns * group, head + len(lines) * (side + foot + gap)), "white")
    draw = ImageDraw.Draw(canvas)
    title, font, small = (ImageFont.load_default(size=size) for size in (18, 15, 12))
    draw.text((gap, 6), "Samples, each with the nearest training images and their distances", "black", title)
    for column in range(columns):
        x = left + column * group
        for place in range(1 + NEIGHBOURS):
            text = f"nearest {place}" if place else "sample"
            draw.text((x + place * (side + gap) + side // 2, head - 20), text, "black", font, anchor="ma")

    def put(picture: Tensor, x: int, y: int, caption: str, frame: str) -> None:
        image = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((side, side), Image.Resampling.NEAREST)
        canvas.paste(image, (x, y))
        draw.rectangle((x - 1, y - 1, x + side, y + side), outline=frame, width=2 if frame != "lightgrey" else 1)
        draw.text((x + side // 2, y + side + 3), caption, "black", small, anchor="ma")

    for line, (label, rows) in enumerate(lines):
        y = head + line * (side + foot + gap)
        draw.text((gap, y + side // 2), names[label], "black", font, anchor="lm")
        for column, k in enumerate(rows):
            x = left + column * group
            put(samples[0][k], x, y, f"seed {k}", "crimson")
            for place in range(NEIGHBOURS):
                found = int(index[k, place])
                caption = f"{names[int(train[1][found])]} {float(distance[k, place]):.3f}"
                put(train[0][found], x + (1 + place) * (side + gap), y, caption, "lightgrey")
    return canvas


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(dest="task", required=True)
    one = tasks.add_parser("classifier", help="train the classifier")
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--steps", type=int, default=1800)
    one.add_argument("--batch", type=int, default=64)
    one.add_argument("--seed", type=int, default=0)
    one.set_defaults(run=make_classifier)
    two = tasks.add_parser("accuracy", help="share of samples the classifier gives the class that was asked for")
    two.add_argument("--classifier", type=Path, required=True)
    two.set_defaults(run=measure_accuracy)
    three = tasks.add_parser("neighbours", help="a page of samples beside their nearest training images")
    three.add_argument("--classifier", type=Path, help="measure distance in its last features")
    three.add_argument("--out", type=Path, required=True)
    three.set_defaults(run=find_neighbours)
    for task, num in ((two, 450), (three, 27)):
        task.add_argument("--model", required=True, help="anything ldit.load opens")
        task.add_argument("--num", type=int, default=num)
        task.add_argument("--guidance", type=float)
        task.add_argument("--guidance-interval", type=float, nargs=2, metavar=("LO", "HI"))
        task.add_argument("--steps", type=int)
    for task in (one, two, three):
        task.add_argument("--json", type=Path, help="write the result here too")
        task.add_argument("--threads", type=int, help="CPU threads; default torch's own")
    args = parser.parse_args()
    if getattr(args, "num", 1) < 1:
        parser.error("--num: must be at least 1")
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        result = args.run(args)
    except (LditError, OSError, SafetensorError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    versions = {"ldit": ldit.__version__, "torch": torch.__version__, "python": platform.python_version()}
    text = json.dumps(result | {"versions": versions, "date": datetime.now(UTC).date().isoformat()})
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
