"""`ldit evaluate` and `ldit stats` from the request to the report: samples, reference, features, metrics, files.

Under torchrun each of n ranks takes every n-th block of images. Features are summed in float64 and merged in the order
of the ranks, so their number changes a metric by rounding only. The main process alone keeps the rows of features,
computes the metrics and writes the files.
"""

import time
from collections.abc import Callable
from dataclasses import fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ldit.checkpoint.run import begun_with
from ldit.config.requests.evaluate import EXTRACTOR, EvaluateRequest, Features, StatsRequest
from ldit.config.requests.sampling import ModelRequest
from ldit.config.run import MOST_SECONDS
from ldit.config.sections import ParallelConfig
from ldit.data.formats.heldout import share_of
from ldit.errors import EvaluationError
from ldit.eval.compare import compared, table_of
from ldit.eval.extractors.extractor import open_named
from ldit.eval.extractors.inception_weights import fetch_weights
from ldit.eval.extractors.protocol import protocol_of
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
from ldit.eval.metrics.scores import shuffled_splits
from ldit.eval.outputs import check_outputs, check_statistics_file, write_outputs
from ldit.eval.reference import Statistics, open_reference, write_statistics
from ldit.eval.report import depends, number, remarks, table, too_few
from ldit.figure import check_plotting
from ldit.log import logger
from ldit.parallel.world import World, joined, report_once
from ldit.pipeline.load import process_device
from ldit.pipeline.sets.stream import GeneratedStream, ImageStream, check_there, is_images, open_stream
from ldit.storage.atomic import json_text
from ldit.storage.outputs import put
from ldit.training.telemetry import peak_memory
from ldit.version import __version__

if TYPE_CHECKING:
    from ldit.eval.matching import Matching

ASIDE = ("_deviation", "_interval", "_subset", "_splits")
"""Suffixes of report keys that belong to a metric and are not metrics themselves."""
PROTOCOL = 50_000
"""The usual number of images, and the default for a checkpoint."""
TOGETHER = ParallelConfig(timeout=MOST_SECONDS)
"""A long timeout: shares differ, and the main process computes the metrics alone, which may take hours."""
References = dict[tuple[tuple[int, int], MetricPlan], tuple[Reference, dict[str, Any]]]
"""What was measured of a reference, for samples of a size and a plan."""
_OWN = ("source", "batch_size", "device")  # fields of a ModelRequest that also apply to existing images


def check_evaluation(request: EvaluateRequest) -> None:
    """EvaluationError or RequestError for a value that is invalid for any images."""
    least = {"num": 2, "components": 0, "bootstrap": 0, "image_size": 1, "batch_size": 1}
    for name, lowest in least.items():
        value = getattr(request, name)
        if value is not None and value < lowest:
            raise EvaluationError(f"{name}: must be at least {lowest}, got {value}")
    if request.bootstrap and not request.components:
        raise EvaluationError("intervals need principal components: give their number (--components 64)")
    if request.figure is not None:
        if request.others:
            raise EvaluationError("figure: is of one source; leave out the others")
        check_plotting(request.figure, "figure")


def evaluate(request: EvaluateRequest, say: Callable[[str], None]) -> dict[str, Any]:
    """The report, on every rank. The main process writes it to `request.json` and `request.figure` and passes a table
    to `say`; a failure of one does not prevent the others.

    Anything missing, damaged or inconsistent raises an error before images are sampled.
    """
    with report_once():
        check_evaluation(request)
    with joined(TOGETHER) as world:
        device = process_device(request.device)
        weights = world.from_rank0(lambda: _weights(request))
        extractor = world.run_on_all(lambda: _open_extractor(request, weights, device))
        if request.others:
            return _evaluate_several(request, extractor, world, say)
        return evaluate_with(request, extractor, world, say)


def _evaluate_several(
    request: EvaluateRequest, extractor: Extractor, world: World, say: Callable[[str], None]
) -> dict[str, Any]:
    """One report of all sources (`ldit.eval.compare`). All are opened before the first is measured."""
    sources, share = (request.source, *request.others), _share_of(request)
    alone = [replace(request, source=source, others=(), json=None, figure=None) for source in sources]

    def check() -> None:
        for one in alone:
            if world.is_main:
                check_outputs(request.json, None, (one.source, one.reference))
            samples = _open_samples(one)
            reference = _open_reference(one, extractor, samples, share)
            _plan(one, extractor, samples, reference)
            _open_matching(one, extractor, samples, reference)

    world.run_on_all(check)
    known: References = {}
    reports = []
    for one in alone:
        found = evaluate_with(one, extractor, world, known=known, share=share)
        if world.is_main:
            values = ", ".join(f"{name} {number(found[name])}" for name in found["figures"])
            logger.info("%s: %s", one.source, values)
        reports.append(found)

    def finish() -> dict[str, Any]:
        report = compared(reports)
        try:
            say(table_of(report))
        finally:
            if request.json is not None:
                put(request.json, json_text(report))
        return report

    return world.from_rank0(finish)


def _share_of(request: EvaluateRequest) -> str | None:
    """The share of its images that a run among the sources holds out, for a reference PATH@heldout; None where no
    source is such a run. EvaluationError for runs that hold out other shares: they have no reference in common."""
    shares: dict[str, str] = {}
    for source in (request.source, *request.others):
        given = None if is_images(source) else begun_with(Path(source), "data", "heldout")
        if isinstance(given, str) and share_of(given) is not None:
            shares[given] = source
    if len(shares) > 1 and request.reference.endswith("@heldout"):
        words = ", ".join(f"{source} {share}" for share, source in shares.items())
        raise EvaluationError(f"{request.reference}: the runs hold out other shares ({words}); name a set of images")
    return next(iter(shares), None)


def _weights(request: Features) -> str | None:
    """The file of Inception's weights that a request names, or that it asks to be downloaded."""
    given = request.inception_weights
    if not request.fetch:
        return None if given is None else str(given)
    if given is not None or request.extractor != EXTRACTOR:
        raise EvaluationError(
            "fetch: is for Inception's published weights; leave out --inception-weights and --extractor"
        )
    return str(fetch_weights())


def _open_extractor(request: Features, weights: str | None, device: torch.device) -> Extractor:
    return open_named(request.extractor, Path(weights) if weights else None, device, request.protocol)


def evaluate_with(
    request: EvaluateRequest,
    extractor: Extractor,
    world: World,
    say: Callable[[str], None] = lambda text: None,
    known: References | None = None,
    share: str | None = None,
) -> dict[str, Any]:
    """The report of `evaluate` with an open extractor, on every rank of `world`. `known` keeps what was measured of the
    reference, for other sources of this size. `share`: that of PATH@heldout, where the source does not state it."""
    began, pair, block = time.perf_counter(), (request.source, request.reference), request.batch_size
    # Open both sides and decide which metrics to compute, before any image is sampled or read.
    world.from_rank0(lambda: check_outputs(request.json, request.figure, pair))
    samples = world.run_on_all(lambda: _open_samples(request))
    against = world.run_on_all(lambda: _open_reference(request, extractor, samples, share))
    with report_once():
        plan, missing = _plan(request, extractor, samples, against)
        shuffled = protocol_of(request.protocol).shuffled_splits
    matching = world.run_on_all(lambda: _open_matching(request, extractor, samples, against))
    warnings = world.from_rank0(lambda: remarks(samples, against, pair, "is" in plan.metrics and not shuffled))
    if world.is_main:
        for line in missing:
            logger.info("left out: %s", line)
        for line in warnings:
            logger.warning("%s", line)
    # Features of the reference first, so that an unusable one is found before images are sampled.
    known = {} if known is None else known
    key = (samples.size, plan)
    if key not in known:
        known[key] = measure_reference(against, extractor, plan, world, block)
    reference, about = known[key]
    world.from_rank0(lambda: check_reference(reference, plan, request.reference))

    # Features of the samples.
    def listen(on_images: Callable[[float], None]) -> None:
        if isinstance(samples, GeneratedStream):
            samples.on_images = on_images

    blocks = samples.blocks(world.rank, world.size)
    splits = shuffled_splits(samples.count) if shuffled else None
    rows = plan.rows or matching is not None
    collected = collect(blocks, extractor, rows, world, samples.count, listen=listen, splits=splits)

    def finish() -> dict[str, Any]:
        # The metrics and what they depend on.
        report = _report(collected, reference, plan, extractor, samples, process_device(request.device))
        if matching is not None and collected.rows is not None:
            found = matching.metrics(collected.rows)
            report |= {**found, "figures": [*report["figures"], *found], "matcher": request.matcher}
        report |= {"compared": list(pair), "num_samples": collected.count}
        report |= {"num_reference": reference.count, **depends(extractor, samples, about)}
        report |= {"seconds": time.perf_counter() - began, "peak_memory": peak_memory(world.device)}
        report |= {"processes": world.size, "device": str(process_device(request.device))}
        report |= {"date": datetime.now(UTC).date().isoformat()}
        report["versions"] = {"ldit": __version__, "torch": torch.__version__}
        # The table and the files.
        few = too_few(extractor, collected.count, reference.count)
        if few and extractor.metric in report:
            logger.warning("%s", few)
        try:
            say(table(report))
        finally:
            write_outputs(request.json, request.figure, report, collected, reference)
        return report

    return world.from_rank0(finish)


def _open_matching(
    request: EvaluateRequest, extractor: Extractor, samples: ImageStream, reference: Statistics | ImageStream
) -> "Matching | None":
    """The matcher of a request, for the captions of the samples among those of the reference, or among their own where
    it has none."""
    if request.matcher is None:
        return None
    from ldit.eval.matching import Matching, open_matcher

    matcher = open_matcher(request.matcher)
    if extractor.name != matcher.config.extractor:
        raise EvaluationError(f"matcher: takes features of {matcher.config.extractor}, not of {extractor.name}")
    captions = samples.captions()
    if captions is None:
        raise EvaluationError(f"matcher: the images of {request.source} have no captions")
    others = None if isinstance(reference, Statistics) else reference.captions()
    return Matching(matcher, captions, others or captions)


def _open_samples(request: EvaluateRequest) -> ImageStream:
    """Existing images, or those that a checkpoint will sample."""
    if is_images(request.source):
        if unused := _unused_option(request):
            raise EvaluationError(f"{request.source} holds images that exist already: {unused} has no effect")
        stream = open_stream(request.source, request.num, request.image_size, request.batch_size)
    else:
        stream = GeneratedStream(request, request.num or PROTOCOL)
    if request.image_size not in (None, min(stream.size)):
        side = " x ".join(map(str, stream.size))
        raise EvaluationError(f"image_size: only folders are cropped, the images of {request.source} are {side}")
    return stream


def _open_reference(
    request: EvaluateRequest, extractor: Extractor, samples: ImageStream, share: str | None
) -> Statistics | ImageStream:
    """What the samples are compared with; of PATH@heldout the share that a run held out."""
    return open_reference(
        request.reference,
        extractor,
        samples.size,
        request.image_size,
        request.batch_size,
        heldout=share or _share_of(request),
    )


def _unused_option(request: EvaluateRequest) -> str:
    """The first option of sampling that is not at its default; "" for none."""
    options = (field for field in fields(ModelRequest) if field.name not in _OWN)
    return next((field.name for field in options if getattr(request, field.name) != field.default), "")


def _plan(
    request: EvaluateRequest, extractor: Extractor, samples: ImageStream, reference: Statistics | ImageStream
) -> tuple[MetricPlan, list[str]]:
    """Which metrics to compute, and a line for each that cannot be computed. EvaluationError if one of those was
    requested by name, or none is left."""
    # What the reference has.
    spatial = rows = True
    counts = [("images", samples.count), ("reference images", reference.count)]
    if isinstance(reference, Statistics):
        spatial, rows = reference.spatial_mean is not None, reference.images is not None
        counts[1] = ("reference images", None if reference.images is None else len(reference.images))
    # Metrics that extractor and reference allow, and for which there are enough images.
    metrics, missing = available(request.metrics, extractor.metric, spatial, rows)
    for what, count in counts:
        few = [name for name in metrics if count is not None and count < LEAST.get(name, 0)]
        missing += [f"{name} needs at least {LEAST[name]} {what}, got {count}" for name in few]
        metrics = tuple(name for name in metrics if name not in few)
    if missing and (request.metrics or not metrics):
        raise EvaluationError(f"metrics: {missing[0]}")
    # Principal components: N images span at most N - 1.
    spans = min(extractor.width, (reference.count or extractor.width + 1) - 1)
    drawn = request.figure is not None
    for name, components in (("components", request.components), ("figure: components", 2 if drawn else 0)):
        if components > spans:
            raise EvaluationError(f"{name}: {components} are too many for a reference that spans at most {spans}")
    return MetricPlan(metrics, request.components, request.bootstrap, drawn), missing


def _report(
    collected: Collected,
    reference: Reference,
    plan: MetricPlan,
    extractor: Extractor,
    samples: ImageStream,
    device: torch.device,
) -> dict[str, Any]:
    """The metrics, the list of their names ("figures"), and a row for each class if the samples have labels."""
    report = compute_metrics(collected, reference, plan, extractor.metric, device)
    reached = report.pop("reached", None)
    report["figures"] = [name for name in report if not name.endswith(ASIDE)]
    if samples.labels is not None:
        classes = tuple(getattr(extractor, "classes", ()))
        report["classes"] = by_class(collected, samples.labels, samples.names, reached, classes)
    return report


def save_statistics(request: StatsRequest) -> tuple[int, tuple[int, int]]:
    """`ldit stats`: write the moments of a set's features to a file that can replace the images as a reference. Returns
    the number of images, and their height and width as they were compared."""
    source, out = request.images, request.out
    with report_once():
        if out.suffix != ".npz":
            raise EvaluationError(f"--out {out}: expected a name that ends in .npz")
        if request.keep_images < 0:
            raise EvaluationError(f"keep_images: must be 0 or more, got {request.keep_images}")
    with joined(TOGETHER) as world:
        # Check and open everything.
        world.run_on_all(lambda: _check_images(source))
        world.from_rank0(lambda: check_statistics_file(out, source))
        device = process_device(request.device)
        weights = world.from_rank0(lambda: _weights(request))
        extractor = world.run_on_all(lambda: _open_extractor(request, weights, device))
        stream = world.run_on_all(lambda: open_stream(source, request.num, request.image_size, request.batch_size))
        # Compute the moments, and write them.
        collected = collect(stream.blocks(world.rank, world.size), extractor, False, world, stream.count)
        spatial = collected.spatial
        statistics = Statistics(
            collected.count, collected.pool.mean, collected.pool.covariance,
            spatial_mean=None if spatial is None else spatial.mean,
            spatial_covariance=None if spatial is None else spatial.covariance,
            extractor=extractor.name, fingerprint=extractor.fingerprint, resize=extractor.resize, size=stream.size,
        )  # fmt: skip
        world.from_rank0(lambda: write_statistics(out, statistics, _images_to_keep(request, stream.count)))
        return collected.count, stream.size


def _images_to_keep(request: StatsRequest, count: int) -> np.ndarray | None:
    """`keep_images` images spread over the set, uint8 (N, H, W, 3); None for none."""
    wanted = min(request.keep_images, count)
    if not wanted:
        return None
    stream = open_stream(request.images, wanted, request.image_size, request.batch_size)
    parts = [images.permute(0, 2, 3, 1).numpy() for _, images in stream.blocks(0, 1)]
    return np.concatenate(parts)


def _check_images(source: str) -> None:
    check_there(source)
    if not is_images(source):
        raise EvaluationError(f"{source} is not a set of images: expected a folder, an .npz, or a bundled set")
