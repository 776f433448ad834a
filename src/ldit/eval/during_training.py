"""Evaluation during training: compares samples of the EMA weights with a reference, and records the best step."""

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
from ldit.config.spec import ModelSpec
from ldit.errors import ConfigError, DataError, EvaluationError
from ldit.eval.extractors.extractor import open_named
from ldit.eval.features import Extractor
from ldit.eval.measure import STOP, collect, measure_reference
from ldit.eval.metrics.metrics import LEAST, MetricPlan, Reference, check_reference, compute_metrics, reference_of
from ldit.eval.reference import Statistics, open_reference
from ldit.eval.report import other_size, too_few
from ldit.log import logger
from ldit.pipeline.generate import ImageSampler, Sample
from ldit.pipeline.load import Pipeline
from ldit.pipeline.request import ResolvedRequest
from ldit.pipeline.sets.job import Labels, cost
from ldit.pipeline.sets.stream import ImageStream, TrainingStream
from ldit.precision import COMPUTE
from ldit.sampling.fast.oom import out_of_memory
from ldit.storage.shared_job import cut
from ldit.training.hooks import eager
from ldit.training.state import TrainState
from ldit.training.tasks.task import HookContext
from ldit.training.trainer import BEST

TRAINING_IMAGES = 50_000
PLAN = MetricPlan(("fd",))

_Reference = Statistics | ImageStream | TrainingStream


def evaluation_hook(
    config: RunConfig, spec: ModelSpec, request: ResolvedRequest, codec: Codec, context: HookContext
) -> Callable[[TrainState], dict[str, Any]]:
    """A hook that returns the Fréchet distance of `eval.num` images under its name ("fid", "fd_…"), and "best": true if
    it is the lowest of the run, which RUN/best.json then records. `request` says how images are sampled.

    The extractor and the reference are opened here, so that errors in them come before the first step; the reference's
    features are computed at the first evaluation. If images cannot be read or measured later, are not finite, or need
    too much memory, the hook warns and returns nothing, and training continues.
    """
    options, world = config.eval, context.world
    # Open the extractor and the reference on every rank.
    weights = Path(options.inception_weights) if options.inception_weights else None
    protocol = options.protocol or None
    extractor = world.run_on_all(lambda: open_named(options.extractor, weights, world.device, protocol))
    if context.data.cache is not None and not options.reference:
        raise ConfigError("eval.reference: the run trains on latents; name the images, or statistics of `ldit stats`")
    reference = world.run_on_all(lambda: _open_reference(config, extractor, context))
    # What a value depends on: `conditions` are logged once; all (`exactly`) are saved with the best value, so that
    # only comparable values are compared.
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
        "sampling": request.sampling(),
        "precision": config.train.precision,
    }
    if world.is_main:
        words = ", ".join(f"{name.replace('pictures', 'images')} {value}" for name, value in conditions.items())
        logger.info("evaluation every %d steps: %s of balanced labels, %s", options.every, extractor.metric, words)
        if few := too_few(extractor, options.num, reference.count):
            logger.warning("%s", few)
    cached: list[Reference] = []  # the reference's features, after the first evaluation

    def run(state: TrainState) -> dict[str, Any]:
        if not cached:
            cached.append(_features(reference, extractor, context, options.batch_size))
        # Sample with the EMA weights, block by block, and keep only moments of the features.
        dtype = COMPUTE[state.config.train.precision]
        mark = lambda: context.watchdog.mark("evaluation")  # noqa: E731
        with state.weights.swapped_in(state.averages.main) as model, eager():
            pipe = Pipeline(model, spec, dtype=dtype, codec=codec)
            sampled = _SampledBlocks(pipe, request, options.num, options.batch_size, context, mark)
            collected = collect(sampled.blocks(), extractor, False, world, 0, mark, together=True)
        if not all(world.gather(sampled.finite)):
            raise EvaluationError("its images are not finite")
        # Compare with the reference, and with the best value so far.
        values = world.from_rank0(lambda: compute_metrics(collected, cached[0], PLAN, extractor.metric, world.device))
        value: float = values[extractor.metric]
        best = _is_best(state, value, exactly, context.out)
        return {extractor.metric: value, **({BEST: True} if best else {})}

    def or_warn(state: TrainState) -> dict[str, Any]:
        try:
            return run(state)
        except (EvaluationError, DataError) as error:  # the same on all ranks
            if world.is_main:
                # str: a stored error would keep its frames, and their tensors.
                logger.warning("step %d: no evaluation: %s", state.step, str(error))
        gc.collect()  # the error's frames form cycles, and hold memory that the next step needs
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
        return {}

    return or_warn


class _SampledBlocks:
    """Samples this rank's share of the images.

    A sharded network needs all ranks for every pass, so all make the same number of passes, and stop together when one
    of them fails. A rank whose share is smaller samples the first block again, uncounted. The ranks of a
    tensor-parallel group sample the same images, of which one copy counts.
    """

    def __init__(
        self,
        pipe: Pipeline,
        request: ResolvedRequest,
        num: int,
        size: int,
        context: HookContext,
        mark: Callable[[], None],
    ) -> None:
        self.pipe, self.request, self.world, self.mark, self.size = pipe, request, context.world, mark, size
        count = build_conditioner(pipe.spec).count
        self.labels = Labels("balanced" if count else None, tuple(range(max(count, 1))), 0)
        self.ranges, self.finite = cut(num, size), True

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yields (number of the first image, uint8 (b, 3, H, W)); afterwards `finite` tells whether all images were
        finite."""
        world, ranges = self.world, self.ranges
        own = ranges[world.data_part :: world.data_parts]
        fault: Exception | None = None
        for turn in range(-(-len(ranges) // world.data_parts)):
            # Before each pass the ranks tell each other of errors: here, or in the extractor (the alarm).
            if any(world.gather(fault is not None or world.alarmed(STOP))):
                break
            rows = own[turn] if turn < len(own) else ranges[0]
            try:
                images = self._images(rows)
                finite, block = bool(images.isfinite().all()), to_uint8(images.nan_to_num())
            except Exception as error:  # the other ranks learn of it before the next pass
                fault = error
                continue
            if turn < len(own) and world.tp_index == 0:
                self.finite = self.finite and finite
                yield rows.start, block
        # Raise this rank's error now; the others were told to stop.
        if fault is not None and (out_of_memory(fault) or out_of_memory(fault.__cause__ or fault)):
            raise EvaluationError("there is not enough memory for its images") from fault
        if fault is not None:
            raise fault

    def _images(self, rows: range) -> Tensor:
        """Images (b, 3, H, W) with seeds `rows`."""
        request = replace(self.request, labels=self.labels.of(rows), seeds=tuple(rows))
        events = ImageSampler(self.pipe, request, batch_size=self.size, callback=lambda step: self.mark()).events()
        return torch.stack([e.tensor for e in events if isinstance(e, Sample) and e.tensor is not None])


def _open_reference(config: RunConfig, extractor: Extractor, context: HookContext) -> _Reference:
    """The reference, by default the training images; EvaluationError or DataError when no distance to it can be
    computed."""
    options, side = config.eval, config.data.image_size
    if not options.reference:
        return TrainingStream(context.data, TRAINING_IMAGES, options.batch_size, config.data.bad == "skip")
    name = f"eval.reference {options.reference}"
    reference = open_reference(options.reference, extractor, (side, side), side, options.batch_size, "eval.reference")
    if isinstance(reference, Statistics):
        check_reference(Reference(reference.mean, reference.covariance, reference.count, None, None), PLAN, name)
        if context.world.is_main and (line := other_size((side, side), reference.size)):
            logger.warning("%s: %s", name, line)
    elif reference.count < LEAST["fd"]:
        raise EvaluationError(f"{name}: a covariance needs at least 2 images, got {reference.count}")
    return reference


def _about(reference: _Reference) -> dict[str, Any]:
    """What distinguishes a reference from another of the same name; for a folder, only the number of images. Training
    images need nothing: other ones would be another run."""
    if isinstance(reference, Statistics):
        return {"statistics": reference.name, "crc32": reference.crc32}
    return {} if isinstance(reference, TrainingStream) else reference.about


def _features(reference: _Reference, extractor: Extractor, context: HookContext, block: int) -> Reference:
    """The reference's statistics, computed from its images if it has none."""
    world = context.world
    mark = lambda: context.watchdog.mark("features of the reference")  # noqa: E731
    if not isinstance(reference, TrainingStream):
        return measure_reference(reference, extractor, PLAN, world, block, mark)[0]
    return reference_of(collect(reference.blocks(world.rank, world.size), extractor, False, world, 0, mark))


def _is_best(state: TrainState, value: float, conditions: dict[str, Any], out: Path) -> bool:
    """Whether this step has a lower value than every earlier step of the run under the same conditions. If so,
    RUN/best.json records it, before the step is committed."""
    conditions = json.loads(json.dumps(conditions))  # tuples as lists, to compare with the file

    def compare() -> bool:
        best = best_step(out)
        # Files of older versions have fewer conditions: those must be equal.
        comparable = best is not None and all(conditions.get(name) == old for name, old in best.conditions.items())
        known = [*best.before, (best.step, best.value)] if best is not None and comparable else []
        before = [pair for pair in known if pair[0] < state.step]
        if before and before[-1][1] <= value:
            return False
        try:
            write_best(out, Best(state.step, value, conditions, tuple(before)))
        except OSError as error:
            logger.warning("step %d is the best, but that was not written: %s", state.step, error.strerror or error)
            return False
        return True

    return bool(state.world.from_rank0(compare))
