"""Checks of runs over real folders, from inside the group: images that cannot be read, an autoencoder, a
classifier, evaluation along the way."""

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from eval.evaluation import Stub
from PIL import Image
from runs import ALONE, tiny

from ldit.commands import train as flow
from ldit.config.autoencoder import AutoencoderModelConfig, AutoencoderRun, AutoencoderSpec
from ldit.config.classifier import ClassifierModelConfig, ClassifierRun, ClassifierSpec
from ldit.config.experiment import Experiment
from ldit.config.run import BaseRun
from ldit.config.sections import DataConfig, EvalConfig, HeldoutConfig, ParallelConfig
from ldit.data.loader import Loader
from ldit.data.source import open_data
from ldit.errors import EvaluationError
from ldit.eval import during_training as evaluation_hook
from ldit.eval.extractors import extractor
from ldit.eval.features import Features
from ldit.parallel.world import World, world_of
from ldit.training.step import fill_fresh, new_state, train_step
from ldit.training.tasks.autoencoder import AutoencoderTask
from ldit.training.tasks.classifier import ClassifierTask
from ldit.training.tasks.task import Task

GOOD, DAMAGED = 120, 400


def images(folder: Path) -> list[str]:
    """Two classes of noise; 400 files that are damaged by construction, whose names are returned."""
    random, damaged = np.random.default_rng(0), []
    for index in range(GOOD + DAMAGED):
        name = f"{'ab'[index % 2]}/{index:03d}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / name)
        if index % 13 < 10 and len(damaged) < DAMAGED:
            data = (folder / name).read_bytes()
            kept = (b"", b"no picture", data[: len(data) // 2], data[:40])[
                index % 4
            ]  # the pixels are half gone at least
            (folder / name).write_bytes(kept)
            damaged.append(name)
    return sorted(damaged)


def skipping(folder: Path, layout: str) -> Any:
    """One epoch over those images, leaving out what cannot be read: the record that the first process wrote, and the
    losses of the steps that had any image."""
    parallel = ParallelConfig(tp=2 if layout == "tp2" else 1)
    w = _world(parallel)
    config = tiny(batch_size=8, steps=(GOOD + DAMAGED) // 8, log_every=1, attention_every=0, sample_every=0,
                  checkpoint_every=0)  # fmt: skip
    data = DataConfig(str(folder / "damaged"), 16, bad="skip", workers=2)
    config = replace(config, model=replace(config.model, num_classes=2), data=data, parallel=parallel,
                     heldout=HeldoutConfig(0, 0))  # fmt: skip
    out = folder / f"skipping-{layout}-{w.size}"
    with ExitStack() as stack:
        flow._train(Experiment(config=config), out, w, stack)
    found: list[Any] = []
    if w.is_main:
        lines = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
        losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses = [loss for loss in losses if loss]  # a batch without one readable image has none
        found = [sorted(line["where"] for line in lines), len(lines), losses]
    return w.gather(found)[0]


def autoencoder(folder: Path, _: str) -> Any:
    """Losses of an autoencoder over some steps: one unit of FSDP2 in several processes."""
    w = _world(ParallelConfig())
    config = AutoencoderRun(
        model=AutoencoderModelConfig(2, (8, 16), 1, 4, mid_block_attention=True), train=tiny().train
    )
    return _losses(config, AutoencoderTask(config, AutoencoderSpec(config.model)), w, 16)


def classifier(folder: Path, _: str) -> Any:
    """The same of a classifier, whose samples are changed and whose features are left out by position."""
    w = _world(ParallelConfig())
    config = ClassifierRun(model=ClassifierModelConfig((8, 16), 4), train=tiny().train)
    spec = ClassifierSpec(config.model, 32, tuple("abcdefghi"))
    return _losses(config, ClassifierTask(config, spec, torch.linspace(0.5, 1.5, 9)), w, 32)


def evaluation(folder: Path, layout: str) -> Any:
    """Distances of seven images in blocks of three after each of four steps, the best step, and those that are left:
    every process makes as many passes, some without a block of its own."""
    parallel = ParallelConfig(tp=2 if layout == "tp2" else 1, replicate=2 if layout == "broken" else 1)
    w = _world(parallel)
    config = tiny(batch_size=8, steps=4, log_every=1, attention_every=0, sample_every=0, checkpoint_every=0, keep=1)
    config = replace(config, parallel=parallel, heldout=HeldoutConfig(0, 0),
                     eval=EvalConfig(every=1, num=7, batch_size=3, extractor="stub"))  # fmt: skip
    out = folder / f"evaluation-{layout}-{w.size}"
    extractor.open_extractor = lambda name, weights, device, protocol=None: Stub()
    if layout == "broken":
        w = replace(w, store=dist.FileStore(str(folder / "alarms"), w.size))
        broken, real = Broken(w.rank == w.size - 1), evaluation_hook._SampledBlocks.__base__
        extractor.open_extractor = lambda name, weights, device, protocol=None: broken
    with ExitStack() as stack:
        flow._train(Experiment(config=config), out, w, stack)
    found: list[Any] = []
    if w.is_main:
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        steps = sorted(path.name for path in (out / "checkpoints").iterdir())
        found = [[record.get("fd_stub") for record in records], json.loads((out / "best.json").read_text()), steps]
    passes = w.gather(broken.passes if layout == "broken" else None)
    if layout == "broken":
        evaluation_hook._SampledBlocks = real
    return [*w.gather(found)[0], *([passes] if layout == "broken" else [])]


class Broken(Stub):
    """On one process an extractor that fails at its second evaluation along the way, and images that fail at the
    third. `passes` are those of each evaluation."""

    def __init__(self, failing: bool) -> None:
        super().__init__()
        self.failing, self.passes = failing, []
        broken = self

        class Made(evaluation_hook._SampledBlocks):
            def __init__(self, *given: Any) -> None:
                super().__init__(*given)
                broken.passes.append(0)

            def _images(self, rows: range) -> torch.Tensor:
                broken.passes[-1] += 1
                broken.fail_at(3)
                return super()._images(rows)

        evaluation_hook._SampledBlocks = Made

    def fail_at(self, evaluation: int) -> None:
        if self.failing and len(self.passes) == evaluation:
            raise EvaluationError("broken")

    def __call__(self, images: torch.Tensor) -> Features:
        self.fail_at(2)
        return super().__call__(images)


def _losses(config: BaseRun, task: Task, w: World, side: int) -> list[float]:
    state = new_state(config, task, w)
    fill_fresh(state, task)
    data, _ = open_data("emoji64", side, max_per_class=10)
    loader = Loader(data, 8, 0, True, 0, w.data_part, w.data_parts)
    return [train_step(state, task, batch).values["loss"] for batch in loader.from_step(0, 8)]


def _world(parallel: ParallelConfig) -> World:
    return world_of(parallel, torch.device("cpu")) if dist.is_initialized() else ALONE
