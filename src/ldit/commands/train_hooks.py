"""Hooks of a diffusion run that sample images: grids, and evaluation against a reference."""

from collections.abc import Callable
from functools import partial

from ldit.codecs.codec import Codec
from ldit.codecs.pixels import labelled_grid
from ldit.config.requests.sampling import SamplingRequest
from ldit.errors import CodecError
from ldit.log import logger
from ldit.pipeline.generate import ImageSampler, Sample
from ldit.pipeline.loaded import LoadedModel
from ldit.pipeline.request import ResolvedRequest, check_request
from ldit.precision import COMPUTE
from ldit.training.hooks import eager, save_grid
from ldit.training.state import TrainState
from ldit.training.tasks.diffusion import DiffusionTask
from ldit.training.tasks.task import Hook, HookContext, Task

SAMPLES_PER_CLASS = 2
MOST_CLASSES = 16  # in a grid


def check_sampling(task: Task) -> None:
    """CodecError or RequestError for samples that the run cannot make; called before the run directory is touched."""
    if not isinstance(task, DiffusionTask):
        return
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
    request = grid_request(task)
    hooks = [Hook(config.train.sample_every, sample_hook(task, request, codec, context))]
    if config.eval.every:
        from ldit.eval.during_training import evaluation_hook  # imports much that other runs do not need

        measure = evaluation_hook(config, task.spec, request, codec, context)
        hooks.append(Hook(config.eval.every, measure))
    return hooks


def grid_request(task: DiffusionTask) -> ResolvedRequest:
    """The request for sample grids: the first classes, without guidance if the model has no null class."""
    conditioner = task.conditioner
    if conditioner.is_unconditional:
        return check_request(task.spec, SamplingRequest(num=6 * SAMPLES_PER_CLASS), process=task.process)
    labels = [label for label in range(min(conditioner.count, MOST_CLASSES)) for _ in range(SAMPLES_PER_CLASS)]
    guidance = 1.0 if conditioner.null is None else None
    request = SamplingRequest(class_labels=labels, guidance=guidance)
    return check_request(task.spec, request, process=task.process)


def sample_hook(
    task: DiffusionTask, request: ResolvedRequest, codec: Codec, context: HookContext
) -> Callable[[TrainState], None]:
    """A hook that writes a labelled grid of samples of the EMA weights to RUN/samples/step-….png."""

    def run(state: TrainState) -> None:
        with state.weights.swapped_in(state.averages.main) as model, eager():
            loaded = LoadedModel(model, task.spec, dtype=COMPUTE[state.config.train.precision], codec=codec)
            events = ImageSampler(loaded, request, callback=lambda step: context.watchdog.mark("samples")).events()
            images = [event.image for event in events if isinstance(event, Sample) and event.image is not None]
        if state.world.is_main:
            captions = [task.conditioner.name_of(label) for label in request.labels]
            draw = partial(labelled_grid, images, captions, columns=6, scale=2 if images[0].width < 128 else 1)
            save_grid(context.out, state.step, draw)

    return run
