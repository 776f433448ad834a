"""Evaluation during training: images of the EMA weights against a reference, and which step was the best."""

import gc
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldit.checkpoint.run import Best, best_step, write_best
from ldit.codecs.codec import Codec
from ldit.codecs.conditioners import build_conditioner
from ldit.codecs.pixels import to_uint8
from ldit.config.run import RunConfig
from ldit.config.serial import to_dict
from ldit.config.spec import ModelSpec
from ldit.errors import ConfigError, DataError, EvaluationError
from ldit.eval.extractors.extractor import open_named
from ldit.eval.features import Extractor
from ldit.eval.measure import STOP, collect, measure_reference
from ldit.eval.metrics.metrics import LEAST, MetricPlan, Reference, check_reference, compute_metrics, reference_of
from ldit.eval.reference import Statistics, open_reference
from ldit.eval.report import too_few
from ldit.log import logger
from ldit.pipeline.generate import Generator, Sample
from ldit.pipeline.load import Pipeline
from ldit.pipeline.request import ResolvedRequest
from ldit.pipeline.sets.job import Labels, cost
from ldit.pipeline.sets.stream import ImageStream, TrainingStream
from ldit.precision import COMPUTE
from ldit.sampling.fast.oom import out_of_memory
from ldit.storage.shared_job import cut
from ldit.train.hooks import eager
from ldit.train.state import TrainState
from ldit.train.tasks.task import HookContext
from ldit.train.trainer import BEST

TRAINING_IMAGES = 50_000
PLAN = MetricPlan(("fd",))

_Reference = Statistics | ImageStream | TrainingStream


def evaluation_hook(
    config: RunConfig, spec: ModelSpec, request: ResolvedRequest, codec: Codec, out: Path, around: HookContext
) -> Callable[[TrainState], dict[str, Any]]:
    """The Fréchet distance of `eval.num` images under its name ("fid", "fd_…"), and "best": true where it is the
    lowest of the run, with RUN/best.json to say so. `request` says how images are sampled.

    The extractor and the reference are opened here, so that what is missing or unfit is known before the first step;
    the features of the reference's images are computed at the first evaluation. Where images cannot be read or
    measured later, are not finite or need too much memory, there is a warning and no value, and training goes on.
    """
    options, world = config.eval, around.world
    # Open the extractor and the reference on every process.
    weights = Path(options.inception_weights) if options.inception_weights else None
    extractor = world.run_on_all(lambda: open_named(options.extractor, weights, world.device))
    if around.data.cache is not None and not options.reference:
        raise ConfigError("eval.reference: the run trains on latents; name the images, or statistics of `ldit stats`")
    reference = world.run_on_all(lambda: _open_reference(config, extractor, around))
    # What a value depends on: said once, and kept beside the best one (exactly).
    conditions = {
        "pictures": options.num,
        "evaluations": cost(request, spec, False)[0],
        "extractor": extractor.name,
        "extractor_sha256": extractor.fingerprint,
        "resize": extractor.resize,
        "reference": options.reference or "training images",
        "reference_pictures": reference.count,
    }
    exactly = {
        "figure": extractor.metric,
        **conditions,
        "reference_is": _about(reference),
        "sampling": {**to_dict(request.settings), "steps": request.steps},
        "precision": config.train.precision,
    }
    if world.is_main:
        words = ", ".join(f"{name.replace('pictures', 'images')} {value}" for name, value in conditions.items())
        logger.info("evaluation every %d steps: %s of balanced labels, %s", options.every, extractor.metric, words)
        if few := too_few(extractor, options.num, reference.count):
            logger.warning("%s", few)
    kept: list[Reference] = []  # the reference's features, from the first evaluation on

    def run(state: TrainState) -> dict[str, Any]:
        if not kept:
            kept.append(_features(reference, extractor, around, options.batch_size))
        # Sample with the EMA weights, block by block, and keep only moments of the features.
        dtype = COMPUTE[state.config.train.precision]
        mark = lambda: around.watchdog.mark("evaluation")  # noqa: E731
        with state.weights.swapped_in(state.averages.main) as model, eager():
            pipe = Pipeline(model, spec, dtype=dtype, codec=codec)
            made = _Made(pipe, request, options.num, options.batch_size, around, mark)
            collected = collect(made.blocks(), extractor, False, world, 0, mark, together=True)
        if not all(world.gather(made.sound)):
            raise EvaluationError("its images are not finite")
        values = world.from_rank0(lambda: compute_metrics(collected, kept[0], PLAN, extractor.metric, world.device))
        value: float = values[extractor.metric]
        best = _is_best(state, value, exactly, out)
        return {extractor.metric: value, **({BEST: True} if best else {})}

    def or_warn(state: TrainState) -> dict[str, Any]:
        try:
            return run(state)
        except (EvaluationError, DataError) as error:  # alike on all processes
            if world.is_main:
                logger.warning("step %d: nothing is measured: %s", state.step, str(error))  # its frames hold memory
        gc.collect()  # frames of a fault hold each other, and the memory that the next step needs
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
        return {}

    return or_warn


class _Made:
    """Images of this process's share. All processes make as many passes, for a network that is sharded needs all
    of them, and stop at the same one where any of them cannot go on; what one makes beyond its share, and what
    tensor-parallel neighbours make alike, counts once."""

    def __init__(
        self,
        pipe: Pipeline,
        request: ResolvedRequest,
        num: int,
        size: int,
        around: HookContext,
        mark: Callable[[], None],
    ) -> None:
        self.pipe, self.request, self.world, self.mark, self.size = pipe, request, around.world, mark, size
        count = build_conditioner(pipe.spec).count
        self.labels = Labels("balanced" if count else None, tuple(range(max(count, 1))), 0)
        self.ranges, self.sound = cut(num, size), True

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        world, ranges = self.world, self.ranges
        own = ranges[world.data_part :: world.data_parts]
        fault: Exception | None = None
        for turn in range(-(-len(ranges) // world.data_parts)):
            if any(world.gather(fault is not None or world.alarmed(STOP))):
                break
            rows = own[turn] if turn < len(own) else ranges[0]
            try:
                images = self._images(rows)
                sound, block = bool(images.isfinite().all()), to_uint8(images.nan_to_num())
            except Exception as error:  # the others hear of it before their next pass
                fault = error
                continue
            if turn < len(own) and world.tp_index == 0:
                self.sound = self.sound and sound
                yield rows.start, block
        if fault is not None and (out_of_memory(fault) or out_of_memory(fault.__cause__ or fault)):
            raise EvaluationError("memory does not suffice for its images") from fault
        if fault is not None:
            raise fault

    def _images(self, rows: range) -> Tensor:
        request = replace(self.request, labels=self.labels.of(rows), seeds=tuple(rows))
        events = Generator(self.pipe, request, batch_size=self.size, callback=lambda step: self.mark()).events()
        return torch.stack([e.tensor for e in events if isinstance(e, Sample) and e.tensor is not None])


def _open_reference(config: RunConfig, extractor: Extractor, around: HookContext) -> _Reference:
    """The reference, by default the training images; EvaluationError or DataError where there is no distance to it."""
    options, side = config.eval, config.data.image_size
    if not options.reference:
        return TrainingStream(around.data, TRAINING_IMAGES, options.batch_size, config.data.bad == "skip")
    name = f"eval.reference {options.reference}"
    reference = open_reference(options.reference, extractor, (side, side), side, options.batch_size, "eval.reference")
    if isinstance(reference, Statistics):
        check_reference(Reference(reference.mean, reference.covariance, reference.count, None, None), PLAN, name)
    elif reference.count < LEAST["fd"]:
        raise EvaluationError(f"{name}: a covariance needs at least 2 images, got {reference.count}")
    return reference


def _about(reference: _Reference) -> dict[str, Any]:
    """What tells a reference from another of its name, images of a folder by their number alone. Other training
    images would be another run."""
    if isinstance(reference, Statistics):
        return {"statistics": reference.name, "crc32": reference.crc32}
    return {} if isinstance(reference, TrainingStream) else reference.about


def _features(reference: _Reference, extractor: Extractor, around: HookContext, block: int) -> Reference:
    world = around.world
    mark = lambda: around.watchdog.mark("features of the reference")  # noqa: E731
    if not isinstance(reference, TrainingStream):
        return measure_reference(reference, extractor, PLAN, world, block, mark)[0]
    return reference_of(collect(reference.blocks(world.rank, world.size), extractor, False, world, 0, mark))


def _is_best(state: TrainState, value: float, conditions: dict[str, Any], out: Path) -> bool:
    """Whether no earlier step of this run had a lower value under the same conditions. RUN/best.json then says so,
    before the step is committed."""
    conditions = json.loads(json.dumps(conditions))  # as they are read again

    def compare() -> bool:
        best = best_step(out)
        # Files of earlier versions have fewer conditions: those they have must agree.
        comparable = best is not None and all(conditions.get(name) == one for name, one in best.conditions.items())
        known = [*best.before, (best.step, best.value)] if best is not None and comparable else []
        before = [pair for pair in known if pair[0] < state.step]
        if before and before[-1][1] <= value:
            return False
        write_best(out, Best(state.step, value, conditions, tuple(before)))
        return True

    return bool(state.world.from_rank0(compare))
