"""Hooks of a diffusion run that sample images: grids, and evaluation against a reference."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ldit.codecs.codec import Codec
from ldit.codecs.conditioners import TextConditioner
from ldit.codecs.pixels import labelled_grid
from ldit.config.requests.sampling import SamplingRequest
from ldit.errors import CodecError
from ldit.log import logger
from ldit.pipeline.generate import ImageSampler, Sample
from ldit.pipeline.loaded import LoadedModel
from ldit.pipeline.request import ResolvedRequest, check_request
from ldit.precision import COMPUTE
from ldit.sampling.step import Step
from ldit.training.hooks import eager, save_grid
from ldit.training.state import TrainState
from ldit.training.tasks.diffusion import DiffusionTask
from ldit.training.tasks.task import Hook, HookContext, Task

SAMPLES_PER_CLASS = 2
MOST_CLASSES = 16  # in a grid
MOST_PROMPTS = 24
LONG = 100  # steps of published defaults that a grid during training does not take
PREVIEW = {"solver": "unipc2", "grid": "karras", "steps": 20}
LINE_EVERY = 30.0  # seconds between lines while a grid is sampled


def check_sampling(task: Task) -> None:
    """CodecError or RequestError for samples that the run cannot make; called before the run directory is touched."""
    if not isinstance(task, DiffusionTask):
        return
    if not task.config.cascade.size:
        grid_request(task)
    if task.codec is None and task.config.eval.every:
        raise CodecError("eval.every: evaluation needs the autoencoder, which was not found")


def sampling_hooks(task: Task, context: HookContext) -> list[Hook]:
    """Sample grids and evaluation of a diffusion run; none for other tasks, or if the autoencoder is not found."""
    if not isinstance(task, DiffusionTask):
        return []
    config, codec = task.config, task.codec
    if codec is None:
        if config.train.sample_every:
            logger.warning("no sample grids during training: the autoencoder was not found")
        return []
    if config.cascade.size:
        logger.info("no sample grids of the second stage of a cascade")
        return []
    hooks = [Hook(config.train.sample_every, sample_hook(task, preview_of(task), codec, context), after_save=True)]
    if config.eval.every:
        from ldit.eval.during_training import evaluation_hook  # imports much that other runs do not need

        measure = evaluation_hook(config, task.spec, grid_request(task), codec, context)
        hooks.append(Hook(config.eval.every, measure))
    return hooks


def preview_of(task: DiffusionTask) -> ResolvedRequest:
    """The request for sample grids. Where the run has no sampling defaults, the published 250 steps of DiT and SiT
    would take as long as many steps of training: 20 steps are as good (docs/solvers.md)."""
    is_long = task.config.sampling is None and task.spec.sampling_defaults.steps > LONG
    return grid_request(task, PREVIEW if is_long else {})


def grid_request(task: DiffusionTask, settings: dict[str, Any] | None = None) -> ResolvedRequest:
    """A request for the first classes, without guidance if the model has no null class."""
    more = settings or {}
    conditioner = task.conditioner
    if isinstance(conditioner, TextConditioner):
        prompts = task.config.text.prompts or _spread(conditioner.texts)
        request = SamplingRequest(prompts=prompts, guidance=None if conditioner.dropout else 1.0, **more)
        return check_request(task.spec, request, process=task.process)
    if conditioner.is_unconditional:
        return check_request(task.spec, SamplingRequest(num=6 * SAMPLES_PER_CLASS, **more), process=task.process)
    labels = [label for label in range(min(conditioner.count, MOST_CLASSES)) for _ in range(SAMPLES_PER_CLASS)]
    guidance = 1.0 if conditioner.null is None else None
    request = SamplingRequest(class_labels=labels, guidance=guidance, **more)
    return check_request(task.spec, request, process=task.process)


def _spread(texts: Sequence[str]) -> list[str]:
    """Some texts, evenly spread."""
    count = min(len(texts), MOST_PROMPTS)
    return [texts[i * len(texts) // count] for i in range(count)]


def sample_hook(
    task: DiffusionTask, request: ResolvedRequest, codec: Codec, context: HookContext
) -> Callable[[TrainState], None]:
    """A hook that writes a labelled grid of samples of the EMA weights to RUN/samples/step-….png."""

    steps = len(request.levels) - 1

    def run(state: TrainState) -> None:
        said = time.monotonic()

        def after(step: Step) -> None:
            nonlocal said
            context.watchdog.mark("samples")
            if time.monotonic() - said > LINE_EVERY:
                said = time.monotonic()
                logger.info("samples of step %d: solver step %d of %d", state.step, step.number + 1, steps)

        def is_stopping() -> bool:  # of several processes, all must leave at the same place
            return bool(context.received) and context.world.size == 1

        with state.weights.swapped_in(state.averages.main) as model, eager():
            dtype, conditioner = COMPUTE[state.config.train.precision], task.conditioner
            features = conditioner.features if isinstance(conditioner, TextConditioner) else None
            loaded = LoadedModel(model, task.spec, dtype=dtype, codec=codec, features=features)
            events = ImageSampler(loaded, request, callback=after, cancelled=is_stopping).events()
            images = [event.image for event in events if isinstance(event, Sample) and event.image is not None]
        if state.world.is_main and len(images) == len(request.labels):
            captions = [request.conditioner.name_of(label) for label in request.labels]
            draw = partial(labelled_grid, images, captions, columns=6, scale=2 if images[0].width < 128 else 1)
            save_grid(context.out, state.step, draw)

    return run
