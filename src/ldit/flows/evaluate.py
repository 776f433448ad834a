"""Pictures against a reference: pictures from anywhere -> features -> figures, each with what it depends on.

Alone or under torchrun: every process takes every n-th block of pictures, features are summed in float64 and merged in
the order of the ranks, so the number of processes changes a figure by rounding alone. Only the first process has the
figures' rows, computes and writes.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldit import __version__
from ldit.checkpoint.commit import replaced, write_json_atomic
from ldit.config.sections import ParallelConfig
from ldit.errors import EvaluationError
from ldit.eval.collect import Collected, Collector
from ldit.eval.extractor import INCEPTION, Extractor, open_extractor
from ldit.eval.figures import Reference, Wanted, available, by_class, clouds, figures, reference_of
from ldit.eval.statistics import Statistics, has_statistics, read_statistics, write_statistics
from ldit.flows.evaluation_figure import draw
from ldit.flows.evaluation_report import table
from ldit.flows.picture_stream import GeneratedStream, PictureStream, is_pictures, open_stream
from ldit.flows.pictures import PictureJob
from ldit.flows.set_job import Rule, SetJob
from ldit.log import logger
from ldit.parallel.world import World, joined
from ldit.train.sight import peak_memory

ASIDE = ("_deviation", "_interval", "_subset", "_splits")
"""Ends of the names of what belongs to a figure."""
PROTOCOL = 50_000
"""Pictures of the field's protocol, and of a checkpoint where no number is asked for."""


@dataclass(frozen=True)
class ExtractorJob:
    """Which features: "inception", "efficientnet-lite0", or the run of a classifier; `weights` is Inception's file."""

    name: str = "inception"
    weights: Path | None = None

    def open(self, device: torch.device) -> Extractor:
        return open_extractor(self.name, self.weights if self.name == INCEPTION else None, device)


@dataclass(frozen=True)
class EvaluateJob:
    """What `ldit evaluate` is asked for. `pictures` says how a checkpoint is sampled; its source may as well be a
    folder or an .npz of pictures, which are taken as they are."""

    pictures: PictureJob
    reference: str
    num: int | None = None
    rule: Rule | None = None
    extractor: ExtractorJob = field(default_factory=ExtractorJob)
    metrics: tuple[str, ...] = ()
    components: int = 0
    resamples: int = 0
    image_size: int | None = None
    json: Path | None = None
    figure: Path | None = None

    def __post_init__(self) -> None:
        least = {"num": 2, "components": 0, "resamples": 0, "image_size": 1}
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise EvaluationError(f"{name}: must be at least {lowest}, got {value}")
        if self.resamples and not self.components:
            raise EvaluationError("intervals are of distances in principal components: say how many (--components 64)")
        if self.figure is not None and self.figure.suffix.lower() != ".png":
            raise EvaluationError(f"figure: expected a name that ends in .png, got {self.figure}")
        for file in (self.json, self.figure):
            if file is not None and not file.absolute().parent.is_dir():
                raise EvaluationError(f"no folder {file.absolute().parent} to write {file.name} into")


def evaluate(job: EvaluateJob) -> tuple[dict[str, Any], str]:
    """The report, and its table on the first process, "" elsewhere; the report is written to `job.json` too.

    EvaluationError and its kin name what is missing, damaged or does not fit together, before pictures are made.
    """
    with joined(ParallelConfig()) as world:
        extractor = world.agreed(lambda: job.extractor.open(world.device))
        report = measured(job, extractor, world)
        if world.first and report["num_samples"] <= extractor.width:
            logger.warning(
                "%d pictures for %d features: a Fréchet distance of so few is far too large; compare sets of equal "
                "size alone, or a few principal components (--components 64), or KID",
                report["num_samples"],
                extractor.width,
            )
        return report, table(report) if world.first else ""


def measured(job: EvaluateJob, extractor: Extractor, world: World) -> dict[str, Any]:
    """The report of `evaluate`, on every process of `world`; the first writes it."""
    began = time.perf_counter()
    samples = world.agreed(lambda: _samples(job, world))
    block = job.pictures.batch_size
    theirs = world.agreed(lambda: open_reference(job.reference, extractor, samples.size, job.image_size, block))
    wanted, missing = _wanted(job, extractor, theirs)
    reference, about = known_reference(theirs, extractor, wanted, world, block)
    found = collect(samples.blocks(world.rank, world.size), extractor, wanted.rows, world, samples.count)
    for line in missing if world.first else ():
        logger.info("left out: %s", line)

    def finish() -> dict[str, Any]:
        report = figures(found, reference, wanted, extractor.metric, world.device)
        reached = report.pop("reached", None)
        report["figures"] = [name for name in report if not name.endswith(ASIDE)]
        if samples.labels is not None:
            classes = tuple(getattr(extractor, "classes", ()))
            report["classes"] = by_class(found, samples.labels, samples.names, reached, classes)
        report |= _conditions(extractor, samples, about, found.count)
        seconds = time.perf_counter() - began
        report |= {"seconds": seconds, "peak_memory": peak_memory(world.device), "processes": world.size}
        report |= {"device": str(world.device), "date": datetime.now(UTC).date().isoformat()}
        report["versions"] = {"ldit": __version__, "torch": torch.__version__}
        if job.json is not None:
            write_json_atomic(job.json, report)
        if job.figure is not None:
            picture = draw(report, f"{job.pictures.source} against {job.reference}", *clouds(found, reference))
            with replaced(job.figure) as temporary:
                picture.save(temporary, "PNG")
        return report

    return world.from_first(finish)


def _wanted(job: EvaluateJob, extractor: Extractor, theirs: Statistics | PictureStream) -> tuple[Wanted, list[str]]:
    """What will be computed, and lines on what cannot be; EvaluationError for what was asked for and cannot."""
    spatial = rows = True
    if isinstance(theirs, Statistics):
        spatial, rows = theirs.spatial_mean is not None, theirs.pictures is not None
    metrics, missing = available(job.metrics, extractor.metric, spatial, rows)
    if job.metrics and missing:
        raise EvaluationError(f"metrics: {missing[0]}")
    return Wanted(metrics, job.components, job.resamples, job.figure is not None), missing


def save_statistics(source: str, out: Path, num: int | None, side: int | None, job: ExtractorJob, batch: int) -> int:
    """`ldit stats`: the features' moments of a set of pictures, as a file that stands for it as a reference; returns
    the number of pictures."""
    if not is_pictures(source):
        raise EvaluationError(f"{source} is no set of pictures: expected a folder, an .npz, or a bundled set")
    if not out.absolute().parent.is_dir():
        raise EvaluationError(f"no folder {out.absolute().parent} to write {out.name} into")
    with joined(ParallelConfig()) as world:
        extractor = world.agreed(lambda: job.open(world.device))
        stream = world.agreed(lambda: open_stream(source, num, side, batch))
        found = collect(stream.blocks(world.rank, world.size), extractor, False, world, stream.count)
        spatial = found.spatial
        kept = Statistics(
            found.count, found.pool.mean, found.pool.covariance,
            spatial_mean=None if spatial is None else spatial.mean,
            spatial_covariance=None if spatial is None else spatial.covariance,
            extractor=extractor.name, fingerprint=extractor.fingerprint, resize=extractor.resize,
        )  # fmt: skip
        world.from_first(lambda: write_statistics(out, kept))
        return found.count


def collect(
    blocks: Iterable[tuple[int, Tensor]],
    extractor: Extractor,
    keep_rows: bool,
    world: World,
    total: int,
    mark: Callable[[], None] = lambda: None,
) -> Collected:
    """Blocks of pictures, (number of the first, uint8 (b, 3, H, W)), of all processes through the extractor. `mark` is
    called after each. `total` is how many there are, for the bar."""
    collector = Collector(keep_rows)

    def run() -> None:
        for first, pictures in _shown(blocks, total, world):
            collector.add(first, extractor(pictures))
            mark()

    world.agreed(run)
    return collector.merged(world)


def _shown(blocks: Iterable[tuple[int, Tensor]], total: int, world: World) -> Iterator[tuple[int, Tensor]]:
    """With a bar on the first process's terminal, of all processes' pictures by its own pace; none without a total."""
    with tqdm(total=total, disable=None if world.first and total else True, unit="picture") as bar:
        for first, pictures in blocks:
            yield first, pictures
            bar.update(min(len(pictures) * world.size, total - bar.n))


def _samples(job: EvaluateJob, world: World) -> PictureStream:
    if is_pictures(job.pictures.source):
        if job.rule is not None or job.pictures.labels:
            raise EvaluationError(f"{job.pictures.source} holds pictures that are there already: labels are not dealt")
        return open_stream(job.pictures.source, job.num, job.image_size, job.pictures.batch_size)
    return GeneratedStream(SetJob(job.pictures, job.num or PROTOCOL, job.rule), world)


def open_reference(
    reference: str, extractor: Extractor, size: tuple[int, int], side: int | None, block: int
) -> Statistics | PictureStream:
    """Saved statistics that fit the extractor, or pictures cut to the samples' size."""
    path = Path(reference).expanduser()
    if path.suffix == ".npz" and has_statistics(path):
        found = read_statistics(path)
        if found.extractor != extractor.name:
            raise EvaluationError(f"{path}: statistics of {found.extractor}, the extractor is {extractor.name}")
        if found.fingerprint not in ("", extractor.fingerprint):
            raise EvaluationError(f"{path}: statistics of other weights of {extractor.name} than these")
        if len(found.mean) != extractor.width:
            raise EvaluationError(f"{path}: {len(found.mean)} features, {extractor.name} has {extractor.width}")
        return found
    if not is_pictures(reference):
        raise EvaluationError(f"--reference {reference}: expected an .npz, a folder of pictures, or a bundled set")
    return open_stream(reference, None, side or min(size), block)


def known_reference(
    theirs: Statistics | PictureStream,
    extractor: Extractor,
    wanted: Wanted,
    world: World,
    block: int,
    mark: Callable[[], None] = lambda: None,
) -> tuple[Reference, dict[str, Any]]:
    """What figures need of the reference; the features of its pictures are computed where those are needed."""
    if not isinstance(theirs, Statistics):
        found = collect(theirs.blocks(world.rank, world.size), extractor, wanted.rows, world, theirs.count, mark)
        return reference_of(found), theirs.about
    rows, count, pictures = None, theirs.count, theirs.pictures
    if wanted.rows and pictures is not None:
        parts = enumerate(pictures.batches(block))
        mine = (
            (i * block, torch.from_numpy(part.copy()).permute(0, 3, 1, 2))
            for i, part in parts
            if i % world.size == world.rank
        )
        rows = collect(mine, extractor, True, world, len(pictures), mark).rows
    spatial = None
    if theirs.spatial_mean is not None and theirs.spatial_covariance is not None:
        spatial = (theirs.spatial_mean, theirs.spatial_covariance)
    about = {"statistics of": count, "pictures": None if pictures is None else len(pictures)}
    return Reference(theirs.mean, theirs.covariance, count, spatial, rows), about


def _conditions(extractor: Extractor, samples: PictureStream, reference: dict[str, Any], count: int) -> dict[str, Any]:
    """What every figure depends on."""
    return {
        "num_samples": count,
        "labels": "random" if samples.about.get("label_rule") == "random" else balance(samples.labels),
        "evaluations": samples.about.get("evaluations"),
        "extractor": extractor.name,
        "extractor_sha256": extractor.fingerprint,
        "resize": extractor.resize,
        "samples": samples.about,
        "reference": reference,
    }


def balance(labels: tuple[int, ...] | None) -> str:
    """How even the labels of a set are."""
    if labels is None:
        return "unknown"
    counts = torch.tensor(labels).bincount()
    counts = counts[counts > 0]
    least, most = int(counts.min()), int(counts.max())
    return "balanced" if most - least <= 1 else f"{least} to {most} a class"
