"""An image-caption matcher for emoji64-styles: training, and its retrieval on held-out images.

    python benchmarks/emoji64_matcher.py train --out FOLDER [--work FOLDER] [--epochs 40]
    python benchmarks/emoji64_matcher.py measure [--matcher emoji64-matcher] [--work FOLDER]

Features of EfficientNet-Lite0 (the images at 224x224) and of all-MiniLM-L6-v2 (means over tokens) are computed once and
kept in --work. Two small networks on top are trained contrastively on the training images: a batch of images against
their captions, one of each image drawn at every visit; equal captions in a batch are no negatives. `measure` ranks the
first caption of each image, which names style, concept and tone, among 100 of the same part of the data.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldit.codecs.text import TextEncoder
from ldit.config.assets import ASSETS
from ldit.config.spec import TextConditionerConfig
from ldit.data.images.image_set import ImageSet
from ldit.data.source import open_data
from ldit.eval.extractors.extractor import open_named
from ldit.eval.matching import Matcher, MatcherConfig, Matching, open_matcher, save_matcher
from ldit.rng import generator

DATA, SIDE = "emoji64-styles", 64
ROOT = ASSETS / DATA
PARTS = ("concepts", "tones", "styles")
BATCH, RATE, DECAY, NOISE = 512, 1e-3, 0.2, 0.1


def image_features(data: ImageSet, file: Path) -> Tensor:
    """(N, 1280), computed once."""
    if file.exists():
        return torch.from_numpy(np.load(file))
    extractor = open_named("efficientnet-lite0", None, torch.device("cpu"))
    rows = []
    for first in range(0, len(data), 50):
        images = [data[index][0] for index in range(first, min(first + 50, len(data)))]
        rows.append(extractor(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)).pool)
        if first % 1000 == 0:
            print(f"{first} of {len(data)} images", flush=True)
    features = torch.cat(rows)
    file.parent.mkdir(parents=True, exist_ok=True)
    np.save(file, features.numpy())
    return features


def text_features(texts: list[str], file: Path) -> Tensor:
    """(N, 384), computed once."""
    if file.exists():
        return torch.from_numpy(np.load(file))
    config = MatcherConfig()
    encoder = TextEncoder(TextConditionerConfig(config.encoder, config.max_tokens))
    rows = [encoder(texts[first : first + 256]).mean() for first in range(0, len(texts), 256)]
    np.save(file, torch.cat(rows).numpy())
    return torch.cat(rows)


def train(arguments: argparse.Namespace) -> None:
    data = open_data(DATA, SIDE)[0]
    captions, work = data.captions(), arguments.work
    pool = image_features(data, work / "images-train.npy")
    texts = text_features(list(captions.texts), work / "texts.npy")
    rows = [data.caption_row(index) for index in range(len(data))]
    matcher = Matcher(MatcherConfig())
    for name, p in matcher.named_parameters():
        if p.ndim == 2:
            torch.nn.init.xavier_uniform_(p, generator=generator(0, "init", 0, name))
    matrices = [p for p in matcher.parameters() if p.ndim == 2]
    rest = [p for p in matcher.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, RATE)
    steps, per_epoch = 0, len(data) // BATCH
    total, began = arguments.epochs * per_epoch, time.perf_counter()
    for epoch in range(arguments.epochs):
        random = generator(0, "epoch", epoch)
        order = torch.randperm(len(data), generator=random)
        for step in range(per_epoch):
            chosen = order[step * BATCH : (step + 1) * BATCH]
            shares = torch.rand(BATCH, generator=random).tolist()
            numbers = torch.tensor([captions.draw(rows[i], u) for i, u in zip(chosen.tolist(), shares, strict=True)])
            images, words = pool[chosen], texts[numbers]
            # Noise on the features, in units of their deviation: there are few images.
            images = images + NOISE * pool.std() * torch.randn(images.shape, generator=random)
            words = words + NOISE * texts.std() * torch.randn(words.shape, generator=random)
            logits = matcher.logits(matcher.embed_images(images), matcher.embed_texts(words))
            same = (numbers[:, None] == numbers) & ~torch.eye(BATCH, dtype=torch.bool)
            logits = logits.masked_fill(same, float("-inf"))
            target = torch.arange(BATCH)
            loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
            for group in optimizer.param_groups:
                group["lr"] = RATE * min(1.0, (steps + 1) / 100, (total - steps) / (0.5 * total))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps += 1
        if epoch % 5 == 4:
            print(f"epoch {epoch + 1}: loss {loss.item():.3f}, {time.perf_counter() - began:.0f} s", flush=True)
    record = {"data": DATA, "images": len(data), "epochs": arguments.epochs, "batch": BATCH, "rate": RATE}
    save_matcher(arguments.out, matcher.eval(), record)
    print(arguments.out)


def measure(arguments: argparse.Namespace) -> None:
    matcher = open_matcher(arguments.matcher)
    data, heldout = open_data(DATA, SIDE)
    assert heldout is not None
    for name, part in (("train", data), ("heldout", heldout)):
        captions = part.captions()
        pool = image_features(part, arguments.work / f"images-{name}.npy")
        own = [captions.texts[captions.main(part.caption_row(index))] for index in range(len(part))]
        report = {name: {"images": len(own), **Matching(matcher, own, own).metrics(pool)}}
        for kind in PARTS if name == "heldout" else ():
            listed = set((ROOT / f"heldout_{kind}.txt").read_text().split("\n"))
            rows = [index for index in range(len(part)) if part.where(index) in listed]
            metrics = Matching(matcher, [own[row] for row in rows], own).metrics(pool[rows])
            report[f"heldout {kind}"] = {"images": len(rows), **metrics}
        print(json.dumps(report, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("train", "measure"))
    parser.add_argument("--out", type=Path, default=Path("emoji64-matcher"))
    parser.add_argument("--work", type=Path, default=Path("matcher-work"))
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--matcher", default="emoji64-matcher")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    {"train": train, "measure": measure}[arguments.command](arguments)


if __name__ == "__main__":
    main()
