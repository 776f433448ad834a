"""Images against a reference: images from anywhere -> features -> figures, each with what it depends on.

Alone or under torchrun: every process takes every n-th block of images, features are summed in float64 and merged in
the order of the ranks, so the number of processes changes a figure by rounding alone. Only the first process has the
figures' rows, computes and writes.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldit.config.requests.evaluate import EvaluateRequest, StatsRequest
from ldit.config.requests.sampling import ModelRequest
from ldit.config.run import MOST_SECONDS
from ldit.config.sections import ParallelConfig
from ldit.errors import EvaluationError
from ldit.eval.extractors.extractor import INCEPTION, open_extractor
from ldit.eval.features import Extractor, Features
from ldit.eval.metrics.collect import Collected, Collector
from ldit.eval.metrics.metrics import (
    LEAST,
    MetricPlan,
    Reference,
    available,
    by_class,
    check_reference,
    figures,
    reference_of,
)
from ldit.eval.outputs import check_outputs, check_statistics_file, write_outputs
from ldit.eval.reference import Statistics, has_statistics, read_statistics, write_statistics
from ldit.eval.report import depends, remarks, table, too_few
from ldit.figure import check_plotting
from ldit.log import logger
from ldit.parallel.world import World, joined, report_once
from ldit.pipeline.load import process_device
from ldit.pipeline.sets.stream import GeneratedStream, ImageStream, check_there, is_images, open_stream
from ldit.sampling.fast.oom import out_of_memory
from ldit.storage.progress import Progress
from ldit.train.telemetry import peak_memory
from ldit.version import __version__

ASIDE = ("_deviation", "_interval", "_subset", "_splits")
"""Ends of the names of what belongs to a figure."""
PROTOCOL = 50_000
"""Images of the field's protocol, and of a checkpoint where no number is asked for."""
STOP = "evaluation"
"""The alarm of a process that cannot go on."""
TOGETHER = ParallelConfig(timeout=MOST_SECONDS)
"""Shares are uneven, and the first process computes the figures alone: hours may pass until all meet again."""
_OWN = ("source", "batch_size", "device")  # of a ModelRequest, that images which exist have too


@dataclass(frozen=True)
class ExtractorJob:
    """Which features: "inception", "efficientnet-lite0", or the run of a classifier; `weights` is Inception's file."""

    name: str = "inception"
    weights: Path | None = None

    def open(self, device: torch.device) -> Extractor:
        """EvaluationError for what is missing or not what it should be."""
        if self.weights is not None and self.name != INCEPTION:
            raise EvaluationError(f"inception_weights: the extractor is {self.name}")
        return open_extractor(self.name, self.weights, device)


def check_evaluation(request: EvaluateRequest) -> None:
    """EvaluationError for a value that cannot be served, whatever the images are."""
    least = {"num": 2, "components": 0, "bootstrap": 0, "image_size": 1, "batch_size": 1}
    for name, lowest in least.items():
        value = getattr(request, name)
        if value is not None and value < lowest:
            raise EvaluationError(f"{name}: must be at least {lowest}, got {value}")
    if request.bootstrap and not request.components:
        raise EvaluationError("intervals are of distances in principal components: say how many (--components 64)")
    if request.figure is not None:
        check_plotting(request.figure, "figure")


def evaluate(job: EvaluateRequest, say: Callable[[str], None]) -> dict[str, Any]:
    """The report, which the first process writes to `job.json` and `job.figure` and says as a table, each of them
    whatever becomes of the others.

    EvaluationError and its kin name what is missing, damaged or does not fit together, before images are made.
    """
    with report_once():
        check_evaluation(job)
    features = ExtractorJob(job.extractor, job.inception_weights)
    with joined(TOGETHER) as world:
        extractor = world.run_on_all(lambda: features.open(process_device(job.device)))
        return measured(job, extractor, world, say)


def measured(
    job: EvaluateRequest, extractor: Extractor, world: World, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """The report of `evaluate`, on every process of `world`."""
    began, device, compared = time.perf_counter(), process_device(job.device), (job.source, job.reference)
    world.from_rank0(lambda: check_outputs(job.json, job.figure, compared))
    samples = world.run_on_all(lambda: _samples(job))
    block = job.batch_size
    theirs = world.run_on_all(lambda: open_reference(job.reference, extractor, samples.size, job.image_size, block))
    with report_once():
        wanted, missing = _wanted(job, extractor, samples, theirs)
    for line in missing if world.is_main else ():
        logger.info("left out: %s", line)
    said = world.from_rank0(lambda: remarks(samples, theirs, compared, "is" in wanted.metrics))
    for line in said if world.is_main else ():
        logger.warning("%s", line)
    reference, about = known_reference(theirs, extractor, wanted, world, block)
    world.from_rank0(lambda: check_reference(reference, wanted, job.reference))
    found = collect(samples.blocks(world.rank, world.size), extractor, wanted.rows, world, samples.count)

    def finish() -> dict[str, Any]:
        report = figures(found, reference, wanted, extractor.metric, device)
        reached = report.pop("reached", None)
        report["figures"] = [name for name in report if not name.endswith(ASIDE)]
        if samples.labels is not None:
            classes = tuple(getattr(extractor, "classes", ()))
            report["classes"] = by_class(found, samples.labels, samples.names, reached, classes)
        report |= {"compared": list(compared), "num_samples": found.count}
        report |= {"num_reference": reference.count, **depends(extractor, samples, about)}
        seconds = time.perf_counter() - began
        report |= {"seconds": seconds, "peak_memory": peak_memory(world.device), "processes": world.size}
        report |= {"device": str(device), "date": datetime.now(UTC).date().isoformat()}
        report["versions"] = {"ldit": __version__, "torch": torch.__version__}
        few = too_few(extractor, report["num_samples"], report["num_reference"])
        if few and extractor.metric in report:
            logger.warning("%s", few)
        try:
            say(table(report))
        finally:
            write_outputs(job.json, job.figure, report, found, reference)
        return report

    return world.from_rank0(finish)


def _wanted(
    job: EvaluateRequest, extractor: Extractor, samples: ImageStream, theirs: Statistics | ImageStream
) -> tuple[MetricPlan, list[str]]:
    """What will be computed, and lines on what cannot be; EvaluationError for what was asked for and cannot."""
    spatial = rows = True
    counts = [("images", samples.count), ("reference images", theirs.count)]
    if isinstance(theirs, Statistics):
        spatial, rows = theirs.spatial_mean is not None, theirs.images is not None
        counts[1] = ("reference images", None if theirs.images is None else len(theirs.images))
    metrics, missing = available(job.metrics, extractor.metric, spatial, rows)
    for what, count in counts:
        few = [name for name in metrics if count is not None and count < LEAST.get(name, 0)]
        missing += [f"{name} needs at least {LEAST[name]} {what}, got {count}" for name in few]
        metrics = tuple(name for name in metrics if name not in few)
    if missing and (job.metrics or not metrics):
        raise EvaluationError(f"metrics: {missing[0]}")
    spans = min(extractor.width, (theirs.count or extractor.width + 1) - 1)
    for name, asked in (("components", job.components), ("figure: components", 2 if job.figure is not None else 0)):
        if asked > spans:
            raise EvaluationError(f"{name}: {asked} are too many for a reference that spans {spans} at most")
    return MetricPlan(metrics, job.components, job.bootstrap, job.figure is not None), missing


def save_statistics(request: StatsRequest) -> int:
    """`ldit stats`: the features' moments of a set of images, as a file that stands for it as a reference; returns
    the number of images."""
    source, out = request.images, request.out
    with report_once():
        if out.suffix != ".npz":
            raise EvaluationError(f"--out {out}: expected a name that ends in .npz")
    features = ExtractorJob(request.extractor, request.inception_weights)
    with joined(TOGETHER) as world:
        world.run_on_all(lambda: _check_images(source))
        world.from_rank0(lambda: check_statistics_file(out, source))
        extractor = world.run_on_all(lambda: features.open(process_device(request.device)))
        stream = world.run_on_all(lambda: open_stream(source, request.num, request.image_size, request.batch_size))
        found = collect(stream.blocks(world.rank, world.size), extractor, False, world, stream.count)
        spatial = found.spatial
        kept = Statistics(
            found.count, found.pool.mean, found.pool.covariance,
            spatial_mean=None if spatial is None else spatial.mean,
            spatial_covariance=None if spatial is None else spatial.covariance,
            extractor=extractor.name, fingerprint=extractor.fingerprint, resize=extractor.resize,
        )  # fmt: skip
        world.from_rank0(lambda: write_statistics(out, kept))
        return found.count


def _check_images(source: str) -> None:
    check_there(source)
    if not is_images(source):
        raise EvaluationError(f"{source} is no set of images: expected a folder, an .npz, or a bundled set")


def collect(
    blocks: Iterable[tuple[int, Tensor]],
    extractor: Extractor,
    keep_rows: bool,
    world: World,
    total: int,
    mark: Callable[[], None] = lambda: None,
    together: bool = False,
) -> Collected:
    """Blocks of images, (number of the first, uint8 (b, 3, H, W)), of all processes through the extractor. `mark` is
    called after each. `total` is how many there are; with 0 there is no bar, and moments and scores alone are kept.

    A fault on one process ends the work of all: at their next block or, where blocks are made `together` and end
    themselves by the alarm, when they do.
    """
    collector = Collector(world, total, keep_rows)

    def run() -> None:
        fault = None
        try:
            for first, images in _shown(blocks, total, world):
                try:
                    collector.add(first, _features(extractor, images))
                    mark()
                except Exception as error:
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

    try:
        world.run_on_all(run)
    except Exception:
        with suppress(RuntimeError):  # of a group that is no more
            world.calm(STOP)
        raise
    return collector.merged()


def _features(extractor: Extractor, images: Tensor) -> Features:
    try:
        return extractor(images)
    except Exception as error:
        if out_of_memory(error):
            raise EvaluationError(
                f"memory does not suffice for {len(images)} images in {extractor.name}: take fewer (batch_size)"
            ) from error
        raise


def _shown(blocks: Iterable[tuple[int, Tensor]], total: int, world: World) -> Iterator[tuple[int, Tensor]]:
    """How far all processes are, by this one's pace; nothing without a total."""
    seen = 0
    progress = Progress(total, lambda: min(seen * world.size, total), world.is_main and total > 0, "images")
    try:
        for first, images in blocks:
            yield first, images
            seen += len(images)
            progress.advance(min(len(images) * world.size, total))
    finally:
        progress.close()


def _samples(job: EvaluateRequest) -> ImageStream:
    if is_images(job.source):
        if idle := _idle(job):
            raise EvaluationError(f"{job.source} holds images that exist already: {idle} does nothing")
        stream = open_stream(job.source, job.num, job.image_size, job.batch_size)
    else:
        stream = GeneratedStream(job, job.num or PROTOCOL)
    if job.image_size not in (None, min(stream.size)):
        side = " x ".join(map(str, stream.size))
        raise EvaluationError(f"image_size: only folders are cut, the images of {job.source} are {side}")
    return stream


def _idle(job: EvaluateRequest) -> str:
    """The first thing asked for that says how images are made, "" for none."""
    names = (one.name for one in fields(ModelRequest) if one.name not in _OWN and getattr(job, one.name) != one.default)
    return next(names, "")


def open_reference(
    reference: str,
    extractor: Extractor,
    size: tuple[int, int],
    side: int | None,
    block: int,
    name: str = "reference",
) -> Statistics | ImageStream:
    """Saved statistics that fit the extractor, or images cut to the samples' size. `name` is what errors call it."""
    path = Path(reference).expanduser()
    check_there(reference, name)
    if path.suffix == ".npz" and has_statistics(path):
        found = read_statistics(path)
        if found.extractor != extractor.name:
            raise EvaluationError(f"{path}: statistics of {found.extractor}, the extractor is {extractor.name}")
        if found.fingerprint not in ("", extractor.fingerprint):
            raise EvaluationError(f"{path}: statistics of other weights of {extractor.name} than these")
        if found.resize not in ("", extractor.resize):
            raise EvaluationError(f"{path}: statistics of images resized by {found.resize}, not {extractor.resize}")
        if len(found.mean) != extractor.width:
            raise EvaluationError(f"{path}: {len(found.mean)} features, {extractor.name} has {extractor.width}")
        spatial = 0 if found.spatial_mean is None else len(found.spatial_mean)
        if spatial not in (0, extractor.spatial):
            raise EvaluationError(f"{path}: {spatial} spatial features, {extractor.name} has {extractor.spatial}")
        return found
    if not is_images(reference):
        raise EvaluationError(f"{name} {reference}: expected an .npz, a folder of images, or a bundled set")
    return open_stream(reference, None, side or min(size), block)


def known_reference(
    theirs: Statistics | ImageStream,
    extractor: Extractor,
    wanted: MetricPlan,
    world: World,
    block: int,
    mark: Callable[[], None] = lambda: None,
) -> tuple[Reference, dict[str, Any]]:
    """What figures need of the reference; the features of its images are computed where those are needed."""
    if not isinstance(theirs, Statistics):
        if not wanted.reference:
            return Reference(torch.empty(0), torch.empty(0, 0), theirs.count, None, None), theirs.about
        found = collect(
            theirs.blocks(world.rank, world.size), extractor, wanted.reference_rows, world, theirs.count, mark
        )
        return reference_of(found), theirs.about
    rows, count, images = None, theirs.count, theirs.images
    if wanted.reference_rows and images is not None:
        parts = enumerate(images.batches(block))
        mine = (
            (i * block, torch.from_numpy(part.copy()).permute(0, 3, 1, 2))
            for i, part in parts
            if i % world.size == world.rank
        )
        rows = collect(mine, extractor, True, world, len(images), mark).rows
    spatial = None
    if theirs.spatial_mean is not None and theirs.spatial_covariance is not None:
        spatial = (theirs.spatial_mean, theirs.spatial_covariance)
    about = {"statistics": theirs.name, "crc32": theirs.crc32, "count": count}
    about |= {"resize": theirs.resize or "not stated"}
    about |= {} if images is None else {"pictures": len(images)}
    return Reference(theirs.mean, theirs.covariance, count, spatial, rows), about
