"""How well a text model follows prompts on emoji64-styles: held-out combinations, and the guidance scale.

    python benchmarks/emoji64_text.py cells [--model emoji64-text] [--json F]   # unseen combinations, against real ones
    python benchmarks/emoji64_text.py sweep [--num 300] [--figure F.png] [--json F]
    python benchmarks/emoji64_text.py page --out PAGE.png                       # beside their nearest training images

`cells`: for each held-out image one sample of its caption (style, concept, tone); EfficientNet-Lite0's features of the
real and of the sampled images go to the image-caption matcher, which ranks the true caption among 100 held-out ones.
`sweep`: the same, and the Fréchet distance of 64 components to the held-out images, over guidance scales. `page`: two
samples, the real held-out image, and the two training images nearest to the first sample (pixels at 64 and 16).
"""

import argparse
import json
import math
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import ldit
from ldit.codecs.pixels import labelled_grid
from ldit.config.assets import ASSETS
from ldit.data.images.image_set import ImageSet
from ldit.data.source import open_data
from ldit.eval.extractors.extractor import open_named
from ldit.eval.matching import Matching, open_matcher
from ldit.eval.metrics.components import principal_components
from ldit.eval.metrics.frechet import frechet_distance
from ldit.figure import figure_bytes, new_figure, style
from ldit.pipeline.load import Pipeline

DATA, SIDE = "emoji64-styles", 64
LISTS = ("tones", "styles", "concepts")
SCALES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
COMPONENTS = 64


class Judge:
    """Lite0's features, the matcher, and the held-out images."""

    def __init__(self, matcher: str) -> None:
        self.extractor = open_named("efficientnet-lite0", None, torch.device("cpu"))
        self.matcher = open_matcher(matcher)
        self.train, heldout = open_data(DATA, SIDE)
        assert heldout is not None
        self.heldout: ImageSet = heldout
        captions = heldout.captions()
        self.captions = [captions.texts[captions.main(heldout.caption_row(i))] for i in range(len(heldout))]

    def rows(self, kind: str, most: int) -> list[int]:
        """Held-out images of a list, at most so many, evenly spread."""
        listed = set((ASSETS / DATA / f"heldout_{kind}.txt").read_text().split("\n"))
        rows = [i for i in range(len(self.heldout)) if self.heldout.where(i) in listed]
        count = min(most, len(rows))
        return [rows[i * len(rows) // count] for i in range(count)]

    def real(self, rows: Sequence[int]) -> Tensor:
        """uint8 (N, 3, H, W)."""
        return torch.from_numpy(np.stack([self.heldout[i][0] for i in rows])).permute(0, 3, 1, 2)

    def features(self, images: Tensor) -> Tensor:
        return torch.cat([self.extractor(part).pool for part in images.split(50)])

    def follow(self, features: Tensor, rows: Sequence[int]) -> dict[str, float]:
        found = Matching(self.matcher, [self.captions[i] for i in rows], self.captions).metrics(features)
        return {name: round(value, 4) for name, value in found.items()}


def sampled(pipe: Pipeline, prompts: Sequence[str], **settings: Any) -> tuple[Tensor, list[Image.Image]]:
    """Images of prompts, with seeds from 0, as uint8 (N, 3, H, W) and as they are."""
    images = pipe(list(prompts), batch_size=32, progress=True, **settings)
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2), images


def cells(args: argparse.Namespace) -> dict[str, Any]:
    judge, pipe = Judge(args.matcher), ldit.load(args.model)
    report: dict[str, Any] = {}
    for kind in LISTS:
        rows = judge.rows(kind, args.num)
        real = judge.follow(judge.features(judge.real(rows)), rows)
        images, _ = sampled(pipe, [judge.captions[i] for i in rows])
        made = judge.follow(judge.features(images), rows)
        ratio = round(made["caption_top1"] / real["caption_top1"], 3)
        error = math.sqrt(made["caption_top1"] * (1 - made["caption_top1"]) / len(rows))
        report[kind] = {"images": len(rows), "real": real, "samples": made, "ratio": ratio, "error": round(error, 3)}
        print(kind, report[kind], flush=True)
    return report


def sweep(args: argparse.Namespace) -> dict[str, Any]:
    judge, pipe = Judge(args.matcher), ldit.load(args.model)
    count = len(judge.heldout)
    rows = [i * count // args.num for i in range(args.num)]
    real = judge.features(judge.real(range(count)))
    mean, covariance = real.double().mean(0), torch.cov(real.double().T)
    axes = principal_components(mean, covariance, COMPONENTS)
    target = axes.project_moments(mean, covariance)
    points = []
    for scale in SCALES:
        images, _ = sampled(pipe, [judge.captions[i] for i in rows], guidance=scale)
        features = judge.features(images)
        own = axes.project(features.double())
        distance = frechet_distance(own.mean(0), torch.cov(own.T), *target)
        points.append({"guidance": scale, "fd": round(distance, 2), **judge.follow(features, rows)})
        print(points[-1], flush=True)
    if args.figure:
        draw(points, args.figure)
    return {"points": points, "num": args.num, "real": judge.follow(real[rows], rows)}


def draw(points: list[dict[str, Any]], file: Path) -> None:
    with style():
        figure = new_figure(5.2, 3.6)
        axes = figure.add_subplot()
        axes.plot([p["fd"] for p in points], [100 * p["caption_top1"] for p in points], "o-")
        for point in points:
            place = (point["fd"], 100 * point["caption_top1"])
            axes.annotate(f"{point['guidance']:g}", place, textcoords="offset points", xytext=(6, -4))
        axes.set_xlabel(f"Fréchet distance, {COMPONENTS} components (lower is better)")
        axes.set_ylabel("own caption first among 100, %")
        file.write_bytes(figure_bytes(figure, file.suffix[1:]))


def page(args: argparse.Namespace) -> dict[str, Any]:
    judge, pipe = Judge(args.matcher), ldit.load(args.model)
    known = np.stack([judge.train[i][0] for i in range(len(judge.train))])
    vectors = described(torch.from_numpy(known).permute(0, 3, 1, 2))
    images, labels = [], []
    for kind in ("tones", "styles"):
        rows = judge.rows(kind, args.num)
        prompts = [judge.captions[i] for i in rows]
        first, shown = sampled(pipe, prompts)
        _, second = sampled(pipe, prompts, seed=1000)
        nearest = torch.cdist(described(first), vectors).topk(2, largest=False).indices.tolist()
        for k, row in enumerate(rows):
            images += [shown[k], second[k], Image.fromarray(judge.heldout[row][0])]
            labels += [prompts[k], "another seed", "held out"]
            images += [Image.fromarray(known[i]) for i in nearest[k]]
            labels += [judge.train.where(i).split("/")[0] + ", nearest" for i in nearest[k]]
    labelled_grid(images, labels, columns=10, scale=2).save(args.out)
    return {"page": args.out.name}


def described(images: Tensor) -> Tensor:
    """(N, K) vectors whose distance is the root mean square over pixels at 64x64 and 16x16."""
    full = images.float() / 127.5 - 1
    parts = (full.flatten(1), F.avg_pool2d(full, SIDE // 16).flatten(1))
    return torch.cat([part / math.sqrt(2 * part.shape[1]) for part in parts], dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = {"cells": cells, "sweep": sweep, "page": page}
    parser.add_argument("task", choices=tasks)
    parser.add_argument("--model", default="emoji64-text")
    parser.add_argument("--matcher", default="emoji64-matcher")
    parser.add_argument("--num", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("page.png"))
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    report = {
        "benchmark": f"emoji64-text-{args.task}",
        "model": Path(args.model).name,
        **tasks[args.task](args),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {"ldit": ldit.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    if args.json:
        args.json.write_text(json.dumps(report) + "\n", encoding="utf-8")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
