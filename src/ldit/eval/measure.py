"""Runs the extractor over a set of images on all ranks, and collects what metrics need."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from ldit.errors import EvaluationError
from ldit.eval.features import Extractor, Features
from ldit.eval.metrics.collect import Collected, Collector
from ldit.eval.metrics.metrics import MetricPlan, Reference, reference_of
from ldit.eval.reference import Statistics
from ldit.parallel.world import World
from ldit.pipeline.sets.stream import ImageStream
from ldit.sampling.fast.oom import out_of_memory
from ldit.storage.progress import Progress

STOP = "evaluation"
"""The alarm that a rank raises when it fails."""


def collect(
    blocks: Iterable[tuple[int, Tensor]],
    extractor: Extractor,
    keep_rows: bool,
    world: World,
    total: int,
    mark: Callable[[], None] = lambda: None,
    together: bool = False,
    listen: Callable[[Callable[[float], None]], None] = lambda on_images: None,
    splits: Tensor | None = None,
) -> Collected:
    """Features of this rank's blocks, (number of the first image, uint8 (b, 3, H, W)), merged with those of all ranks.
    `mark` is called after each block. `total` is the number of images of all ranks; with 0 there is no progress bar,
    and only moments and scores are kept. `listen` is given what wants to hear of parts of images as they are made.
    `splits`: see `Collector`.

    An error on one rank stops all: at their next block, or, if the ranks make blocks `together`, when the iterators end
    because of the alarm.
    """
    collector = Collector(world, total, keep_rows, splits)

    # Each rank works on its own blocks. The alarm is how a rank learns that another has failed.
    def run() -> None:
        fault = None
        try:
            for first, images in _with_progress(blocks, total, world, listen):
                try:
                    collector.add(first, _features(extractor, images))
                    mark()
                except Exception as error:
                    # If ranks make blocks together, continue until the iterator stops: the others wait for this rank.
                    if not together or world.size == 1:
                        raise
                    fault = fault or error
                    world.alarm(STOP)
                if not together and world.alarmed(STOP):
                    return
        except Exception:
            world.alarm(STOP)
            raise
        if fault is not None:
            raise fault

    # If one rank failed, all raise here, and the alarm is reset for the next evaluation.
    try:
        world.run_on_all(run)
    except Exception:
        with suppress(RuntimeError):  # the process group may have ended
            world.clear_alarm(STOP)
        raise
    return collector.merged()


def _features(extractor: Extractor, images: Tensor) -> Features:
    try:
        return extractor(images)
    except Exception as error:
        if out_of_memory(error):
            raise EvaluationError(
                f"there is not enough memory for {len(images)} images in {extractor.name}: use a smaller batch_size"
            ) from error
        raise


def _with_progress(
    blocks: Iterable[tuple[int, Tensor]],
    total: int,
    world: World,
    listen: Callable[[Callable[[float], None]], None],
) -> Iterator[tuple[int, Tensor]]:
    """The blocks, with a progress bar for the images of all ranks, estimated from the main process; none without a
    total."""
    seen = 0
    progress = Progress(total, lambda: min(seen * world.size, total), world.is_main and total > 0, "images")
    listen(lambda count: progress.begun(count * world.size))
    try:
        for first, images in blocks:
            yield first, images
            seen += len(images)
            progress.advance(min(len(images) * world.size, total))
    finally:
        progress.close()


def measure_reference(
    reference: Statistics | ImageStream,
    extractor: Extractor,
    plan: MetricPlan,
    world: World,
    block: int,
    mark: Callable[[], None] = lambda: None,
) -> tuple[Reference, dict[str, Any]]:
    """What the metrics of `plan` need of a reference, and its description in the report. Images go through the
    extractor only if their features are needed."""
    if not isinstance(reference, Statistics):
        return _measure_images(reference, extractor, plan, world, mark), reference.about
    # Statistics may come with images, whose rows some metrics need.
    rows, images = None, reference.images
    if plan.reference_rows and images is not None:
        rows = collect(_blocks(reference, world, block), extractor, True, world, len(images), mark).rows
    spatial = None
    if reference.spatial_mean is not None and reference.spatial_covariance is not None:
        spatial = (reference.spatial_mean, reference.spatial_covariance)
    about: dict[str, Any] = {"statistics": reference.name, "crc32": reference.crc32, "count": reference.count}
    about |= {"resize": reference.resize or "not stated"}
    about |= {} if reference.size is None else {"size": list(reference.size)}
    about |= {} if images is None else {"pictures": len(images)}
    return Reference(reference.mean, reference.covariance, reference.count, spatial, rows), about


def _measure_images(
    images: ImageStream, extractor: Extractor, plan: MetricPlan, world: World, mark: Callable[[], None]
) -> Reference:
    if not plan.reference:
        return Reference(torch.empty(0), torch.empty(0, 0), images.count, None, None)
    blocks = images.blocks(world.rank, world.size)
    return reference_of(collect(blocks, extractor, plan.reference_rows, world, images.count, mark))


def _blocks(statistics: Statistics, world: World, block: int) -> Iterator[tuple[int, Tensor]]:
    """This rank's blocks of the images in a statistics file: every n-th, as for other sets."""
    assert statistics.images is not None
    for index, part in enumerate(statistics.images.batches(block)):  # uint8 (b, H, W, 3)
        if index % world.size == world.rank:
            yield index * block, torch.from_numpy(part.copy()).permute(0, 3, 1, 2)
