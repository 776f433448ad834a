"""`ldit evaluate` and `ldit stats` from the request to the report: samples, reference, features, metrics, files.

Alone or under torchrun: every process takes every n-th block of images, features are summed in float64 and merged in
the order of the ranks, so the number of processes changes a metric by rounding alone. Only the main process has the
rows of features, computes and writes.
"""

import time
from collections.abc import Callable
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any

import torch

from ldit.config.requests.evaluate import EvaluateRequest, StatsRequest
from ldit.config.requests.sampling import ModelRequest
from ldit.config.run import MOST_SECONDS
from ldit.config.sections import ParallelConfig
from ldit.errors import EvaluationError
from ldit.eval.extractors.extractor import open_named
from ldit.eval.features import Extractor
from ldit.eval.measure import collect, measure_reference
from ldit.eval.metrics.collect import Collected
from ldit.eval.metrics.metrics import (
    LEAST,
    MetricPlan,
    Reference,
    available,
    by_class,
    check_reference,
    compute_metrics,
)
from ldit.eval.outputs import check_outputs, check_statistics_file, write_outputs
from ldit.eval.reference import Statistics, open_reference, write_statistics
from ldit.eval.report import depends, remarks, table, too_few
from ldit.figure import check_plotting
from ldit.log import logger
from ldit.parallel.world import World, joined, report_once
from ldit.pipeline.load import process_device
from ldit.pipeline.sets.stream import GeneratedStream, ImageStream, check_there, is_images, open_stream
from ldit.train.telemetry import peak_memory
from ldit.version import __version__

ASIDE = ("_deviation", "_interval", "_subset", "_splits")
"""Ends of the names of what belongs to a metric."""
PROTOCOL = 50_000
"""Images of the field's protocol, and of a checkpoint where no number is asked for."""
TOGETHER = ParallelConfig(timeout=MOST_SECONDS)
"""Shares are uneven, and the main process computes the metrics alone: hours may pass until all meet again."""
_OWN = ("source", "batch_size", "device")  # of a ModelRequest, that images which exist have too


def check_evaluation(request: EvaluateRequest) -> None:
    """EvaluationError or RequestError for a value that cannot be served, whatever the images are."""
    least = {"num": 2, "components": 0, "bootstrap": 0, "image_size": 1, "batch_size": 1}
    for name, lowest in least.items():
        value = getattr(request, name)
        if value is not None and value < lowest:
            raise EvaluationError(f"{name}: must be at least {lowest}, got {value}")
    if request.bootstrap and not request.components:
        raise EvaluationError("intervals are of distances in principal components: say how many (--components 64)")
    if request.figure is not None:
        check_plotting(request.figure, "figure")


def evaluate(request: EvaluateRequest, say: Callable[[str], None]) -> dict[str, Any]:
    """The report, on every process. The main one writes it to `request.json` and `request.figure` and passes a table
    to `say`; each happens even where another fails.

    Errors name what is missing, damaged or does not fit together, before images are made.
    """
    with report_once():
        check_evaluation(request)
    with joined(TOGETHER) as world:
        device = process_device(request.device)
        extractor = world.run_on_all(lambda: open_named(request.extractor, request.inception_weights, device))
        return evaluate_with(request, extractor, world, say)


def evaluate_with(
    request: EvaluateRequest, extractor: Extractor, world: World, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """The report of `evaluate` by an open extractor, on every process of `world`."""
    began, compared, block = time.perf_counter(), (request.source, request.reference), request.batch_size
    # Open both sides and decide what will be computed; nothing is made or read so far.
    world.from_rank0(lambda: check_outputs(request.json, request.figure, compared))
    samples = world.run_on_all(lambda: _open_samples(request))
    other = world.run_on_all(
        lambda: open_reference(request.reference, extractor, samples.size, request.image_size, block)
    )
    with report_once():
        plan, missing = _plan(request, extractor, samples, other)
    warnings = world.from_rank0(lambda: remarks(samples, other, compared, "is" in plan.metrics))
    if world.is_main:
        for line in missing:
            logger.info("left out: %s", line)
        for line in warnings:
            logger.warning("%s", line)
    # Features: the reference first, so that one without a distance is known before samples are made.
    reference, about = measure_reference(other, extractor, plan, world, block)
    world.from_rank0(lambda: check_reference(reference, plan, request.reference))
    collected = collect(samples.blocks(world.rank, world.size), extractor, plan.rows, world, samples.count)

    def finish() -> dict[str, Any]:
        # Metrics, then the table and the files.
        report = _report(collected, reference, plan, extractor, samples, process_device(request.device))
        report |= {"compared": list(compared), "num_samples": collected.count}
        report |= {"num_reference": reference.count, **depends(extractor, samples, about)}
        report |= {"seconds": time.perf_counter() - began, "peak_memory": peak_memory(world.device)}
        report |= {"processes": world.size, "device": str(process_device(request.device))}
        report |= {"date": datetime.now(UTC).date().isoformat()}
        report["versions"] = {"ldit": __version__, "torch": torch.__version__}
        few = too_few(extractor, collected.count, reference.count)
        if few and extractor.metric in report:
            logger.warning("%s", few)
        try:
            say(table(report))
        finally:
            write_outputs(request.json, request.figure, report, collected, reference)
        return report

    return world.from_rank0(finish)


def _open_samples(request: EvaluateRequest) -> ImageStream:
    """Images that exist, or those that a checkpoint will make."""
    if is_images(request.source):
        if idle := _idle(request):
            raise EvaluationError(f"{request.source} holds images that exist already: {idle} does nothing")
        stream = open_stream(request.source, request.num, request.image_size, request.batch_size)
    else:
        stream = GeneratedStream(request, request.num or PROTOCOL)
    if request.image_size not in (None, min(stream.size)):
        side = " x ".join(map(str, stream.size))
        raise EvaluationError(f"image_size: only folders are cut, the images of {request.source} are {side}")
    return stream


def _idle(request: EvaluateRequest) -> str:
    """The first given option that says how images are made, "" for none."""
    options = (one for one in fields(ModelRequest) if one.name not in _OWN)
    return next((one.name for one in options if getattr(request, one.name) != one.default), "")


def _plan(
    request: EvaluateRequest, extractor: Extractor, samples: ImageStream, reference: Statistics | ImageStream
) -> tuple[MetricPlan, list[str]]:
    """What will be computed, and a line for each metric that cannot be. EvaluationError where one was asked for by
    name, or none is left."""
    spatial = rows = True
    counts = [("images", samples.count), ("reference images", reference.count)]
    if isinstance(reference, Statistics):
        spatial, rows = reference.spatial_mean is not None, reference.images is not None
        counts[1] = ("reference images", None if reference.images is None else len(reference.images))
    # What the extractor and the reference allow, and then the numbers of images.
    metrics, missing = available(request.metrics, extractor.metric, spatial, rows)
    for what, count in counts:
        few = [name for name in metrics if count is not None and count < LEAST.get(name, 0)]
        missing += [f"{name} needs at least {LEAST[name]} {what}, got {count}" for name in few]
        metrics = tuple(name for name in metrics if name not in few)
    if missing and (request.metrics or not metrics):
        raise EvaluationError(f"metrics: {missing[0]}")
    # Principal components: N images span N - 1 at most.
    spans = min(extractor.width, (reference.count or extractor.width + 1) - 1)
    drawn = request.figure is not None
    for name, components in (("components", request.components), ("figure: components", 2 if drawn else 0)):
        if components > spans:
            raise EvaluationError(f"{name}: {components} are too many for a reference that spans {spans} at most")
    return MetricPlan(metrics, request.components, request.bootstrap, drawn), missing


def _report(
    collected: Collected,
    reference: Reference,
    plan: MetricPlan,
    extractor: Extractor,
    samples: ImageStream,
    device: torch.device,
) -> dict[str, Any]:
    """Metrics by name, their names, and a row a class where the samples have labels."""
    report = compute_metrics(collected, reference, plan, extractor.metric, device)
    reached = report.pop("reached", None)
    report["figures"] = [name for name in report if not name.endswith(ASIDE)]
    if samples.labels is not None:
        classes = tuple(getattr(extractor, "classes", ()))
        report["classes"] = by_class(collected, samples.labels, samples.names, reached, classes)
    return report


def save_statistics(request: StatsRequest) -> int:
    """`ldit stats`: moments of the features of a set of images, in a file that serves as a reference in their place.
    Returns the number of images."""
    source, out = request.images, request.out
    with report_once():
        if out.suffix != ".npz":
            raise EvaluationError(f"--out {out}: expected a name that ends in .npz")
    with joined(TOGETHER) as world:
        # Check and open everything, then collect, then write.
        world.run_on_all(lambda: _check_images(source))
        world.from_rank0(lambda: check_statistics_file(out, source))
        device = process_device(request.device)
        extractor = world.run_on_all(lambda: open_named(request.extractor, request.inception_weights, device))
        stream = world.run_on_all(lambda: open_stream(source, request.num, request.image_size, request.batch_size))
        collected = collect(stream.blocks(world.rank, world.size), extractor, False, world, stream.count)
        spatial = collected.spatial
        statistics = Statistics(
            collected.count, collected.pool.mean, collected.pool.covariance,
            spatial_mean=None if spatial is None else spatial.mean,
            spatial_covariance=None if spatial is None else spatial.covariance,
            extractor=extractor.name, fingerprint=extractor.fingerprint, resize=extractor.resize,
        )  # fmt: skip
        world.from_rank0(lambda: write_statistics(out, statistics))
        return collected.count


def _check_images(source: str) -> None:
    check_there(source)
    if not is_images(source):
        raise EvaluationError(f"{source} is no set of images: expected a folder, an .npz, or a bundled set")
