"""Recipe to weights: data, network, resume, hooks, loop."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ldit.checkpoint.commit import write_json_atomic
from ldit.checkpoint.export import read_json, read_spec
from ldit.checkpoint.run import RUN_CONFIG, TRAINER, clean, committed_steps, newest_true_step, run_lock, set_aside_newer
from ldit.codecs.pixels import labelled_grid
from ldit.config.model import ClassModelConfig
from ldit.config.run import RunConfig
from ldit.config.serial import to_dict
from ldit.config.spec import ClassConditionerConfig, ModelSpec, PixelCodecConfig
from ldit.data.image_folder import ImageFolder
from ldit.data.loader import Loader, load_batch
from ldit.data.source import open_data
from ldit.errors import ConfigError, DataError, SourceError
from ldit.flows.generate import Generator, Picture
from ldit.flows.pipeline import Pipeline, default_device
from ldit.flows.request import Request, check_request
from ldit.log import logger
from ldit.nn.build import parameter_count
from ldit.train import state_io
from ldit.train.step import TrainState
from ldit.train.task import DiffusionTask
from ldit.train.trainer import Hook, Stopped, Trainer

# What may differ when a run goes on, besides the sampling defaults; everything else would make it another run.
RESUMABLE = {
    "train.steps",
    "train.micro_batch_size",
    "train.cooldown",
    "train.log_every",
    "train.checkpoint_every",
    "train.sample_every",
    "train.keep",
    "data.path",
    "heldout.every",
}
SAMPLES_PER_CLASS = 2
HELDOUT_BATCH = 64


def train(config: RunConfig, out: Path) -> int:
    """Train into `out`, or go on from its newest true step. Same command again = resume.

    Returns the exit code: 0 when the last step is committed; 130, 143 or 138 when SIGINT, SIGTERM or SIGUSR1 ended the
    run after a checkpoint.
    """
    config.check()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("WORLD_SIZE: training in several processes is not built yet")
    if not isinstance(config.codec, PixelCodecConfig):
        raise ConfigError("codec: training in an autoencoder's latents is not built yet")
    data, heldout = open_data(config.data.path, config.data.image_size, config.data.heldout, config.data.max_per_class)
    check_classes(config.model, data)
    spec = ModelSpec(config.model, config.process, config.codec, ClassConditionerConfig(data.names), config.sampling)
    record = {"pictures": len(data), "sha256": data.fingerprint()}
    sampled = _check_sampling(spec)
    with run_lock(out):
        clean(out)
        resume = _check_resume(config, spec, out, record)
        write_json_atomic(out / RUN_CONFIG, config.to_json())
        task = DiffusionTask(config, spec)
        state = TrainState(task.build().to(default_device()), config)
        if resume:
            state_io.restore(resume[1], state)
            logger.info("resumed from %s", resume[1])
            set_aside_newer(out, resume[0])
        logger.info(
            "%s parameters, %d of %d pictures in %d classes, %s, device %s",
            f"{parameter_count(config.model):,}",
            len(data),
            data.found,
            len(data.names),
            config.train.precision,
            default_device(),
        )
        if state.step >= config.train.steps:
            logger.info("nothing left to do: step %d of %d is committed", state.step, config.train.steps)
            return 0
        loader = Loader(data, config.train.batch_size, config.train.seed, config.data.flip)
        hooks = [Hook(config.train.sample_every, _sample_hook(spec, sampled, out))]
        if heldout is not None:
            hooks.insert(0, Hook(config.heldout.every, _heldout_hook(task, heldout, config.heldout.num)))
        try:
            Trainer(config, task, state, loader.from_step, out, hooks, record).fit()
        except Stopped as stopped:
            return stopped.code
    return 0


def check_classes(model: ClassModelConfig, data: ImageFolder) -> None:
    """The model's class count must be the folder's."""
    if model.num_classes != len(data.names):
        raise DataError(
            f"{data.root} has {len(data.names)} class folders, the model has num_classes {model.num_classes} "
            f"(--model.num_classes {len(data.names)})"
        )


def _check_sampling(spec: ModelSpec) -> Request:
    """The request of the picture grids, checked before the first step: the first classes, unguided where the model has
    no null class."""
    classes = range(min(getattr(spec.model, "num_classes", 0), 16))
    labels = [label for label in classes for _ in range(SAMPLES_PER_CLASS)]
    null = getattr(spec.model, "null_class", None)
    return check_request(spec, labels, guidance=1.0 if null is None else None)


def _check_resume(config: RunConfig, spec: ModelSpec, out: Path, record: dict[str, Any]) -> tuple[int, Path] | None:
    """The step to go on from; ConfigError when the run in `out` was another one."""
    steps = committed_steps(out)
    newest = newest_true_step(out)
    if steps and newest is None:
        raise SourceError(f"{out}: every committed step is damaged; nothing to resume from")
    if newest is None:
        return None
    try:
        old = read_json(out / RUN_CONFIG)
        old_spec = read_spec(newest[1])
        old_record = read_json(newest[1] / TRAINER).get("data")
    except AttributeError:
        raise SourceError(f"{newest[1] / TRAINER} is not a training record") from None
    if old_spec.class_names != spec.class_names:
        missing = sorted(set(old_spec.class_names or ()) ^ set(spec.class_names or ()))
        raise DataError(f"class names differ from those of {newest[1]}: {', '.join(missing[:6])}")
    differences = _differences(old, config.to_json())
    said = {key: f"{key} {before!r} -> {after!r}" for key, (before, after) in differences.items()}
    refused = [text for key, text in said.items() if key not in RESUMABLE and not key.startswith("sampling")]
    if refused:
        raise ConfigError(f"{out} is another run, choose a new --out: {'; '.join(refused)}")
    if said:
        logger.info("goes on with %s", "; ".join(said.values()))
    if old_record is not None and old_record != record:
        raise DataError(
            f"the training pictures are not those of {newest[1]}: {old_record.get('pictures')} there, "
            f"{record['pictures']} now, or other names"
        )
    return newest


def _differences(old: Any, new: Any, where: str = "") -> dict[str, tuple[Any, Any]]:
    new = to_dict(new)
    if isinstance(old, dict) and isinstance(new, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for key in sorted(old.keys() | new.keys()):
            found.update(_differences(old.get(key), new.get(key), f"{where}.{key}" if where else key))
        return found
    return {} if old == new else {where: (old, new)}


def _heldout_hook(task: DiffusionTask, data: ImageFolder, count: int) -> Callable[[TrainState], dict[str, float]]:
    """Mean squared error of the EMA weights on pictures kept from training, with fixed times and noise."""
    count = min(count, len(data))
    indices = [i * len(data) // count for i in range(count)]
    batches = [
        load_batch(data, range(i, min(i + HELDOUT_BATCH, count)), indices[i : i + HELDOUT_BATCH], None)
        for i in range(0, count, HELDOUT_BATCH)
    ]

    def run(state: TrainState) -> dict[str, float]:
        model = state.ema_model()
        values: dict[str, list[torch.Tensor]] = {}
        with torch.inference_mode():
            for batch in batches:
                for name, found in task.evaluate(model, batch).items():
                    values.setdefault(name, []).append(found)
        joined = {name: torch.cat(parts) for name, parts in values.items()}
        return {name: found.mean().item() for name, found in joined.items() if found.numel()}

    return run


def _sample_hook(spec: ModelSpec, request: Request, out: Path) -> Callable[[TrainState], None]:
    """A labelled grid of every class from the EMA weights: RUN/samples/step-….png."""

    def run(state: TrainState) -> None:
        events = Generator(Pipeline(state.ema_model(), spec), request).events()
        pictures = [event.image for event in events if isinstance(event, Picture) and event.image is not None]
        labels = request.labels
        names = spec.class_names or [str(label) for label in range(max(labels) + 1)]
        folder = out / "samples"
        folder.mkdir(exist_ok=True)
        grid = labelled_grid(
            pictures, [names[label] for label in labels], columns=6, scale=2 if pictures[0].width < 128 else 1
        )
        grid.save(folder / f"step-{state.step:08d}.png")

    return run
