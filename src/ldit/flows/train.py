"""Recipe to weights: processes, data, network, resume, hooks, loop."""

import json
from contextlib import ExitStack, closing
from pathlib import Path

from ldit.checkpoint.commit import write_json_atomic
from ldit.checkpoint.names import RUN_CONFIG
from ldit.checkpoint.open import Source, open_source
from ldit.checkpoint.run import check_place, clean, drop_newer_snapshots, run_lock, set_aside_newer
from ldit.config.run import RunConfig
from ldit.config.spec import ClassConditionerConfig, ModelSpec, PixelCodecConfig
from ldit.data.loader import Loader
from ldit.data.picture_set import PictureSet
from ldit.data.source import open_data
from ldit.dtypes import products
from ldit.errors import ConfigError
from ldit.flows.hooks import attention_hook, heldout_hook, sample_hook
from ldit.flows.request import Request, check_request
from ldit.flows.resume import step_to_resume
from ldit.log import logger, say_nothing_twice
from ldit.nn.build import forward_flops, parameter_count
from ldit.parallel.watchdog import Watchdog
from ldit.parallel.world import World, joined, launched
from ldit.track import Followers, check_packages, trackers
from ldit.train import state_io
from ldit.train.sight import peak_flops
from ldit.train.start import StartReport, starting_weights
from ldit.train.step import TrainState, fill_fresh, new_state
from ldit.train.task import DiffusionTask
from ldit.train.trainer import Hook, Stopped, Trainer

SAMPLES_PER_CLASS = 2


def train(config: RunConfig, out: Path) -> int:
    """Train into `out`, or go on from its newest true step. Same command again = resume, with any number of processes.

    Returns the exit code: 0 when the last step is committed; 130, 143 or 138 when SIGINT, SIGTERM or SIGUSR1 ended the
    run after a checkpoint.
    """
    try:
        config.check()
    except ConfigError as error:
        error.said_elsewhere = launched().rank > 0  # every process finds the same
        raise
    check_packages(config.track)
    if not isinstance(config.codec, PixelCodecConfig):
        raise ConfigError("codec: training in an autoencoder's latents is not built yet")
    with joined(config.parallel) as world, ExitStack() as stack:
        stack.enter_context(products(config.train.precision))
        if not world.first:
            say_nothing_twice()
        return _train(config, out, world, stack)


def _train(config: RunConfig, out: Path, world: World, stack: ExitStack) -> int:
    _check_shares(config, world)
    d = config.data
    data, heldout = world.agreed(
        lambda: open_data(d.path, d.image_size, d.heldout, d.max_per_class, config.model.num_classes)
    )
    spec = _spec(config, data)
    record = world.from_first(lambda: {"pictures": len(data), "sha256": data.fingerprint()})
    sampled = _check_sampling(spec)
    world.from_first(lambda: check_place(out))
    world.from_first(lambda: stack.enter_context(run_lock(out)))
    world.from_first(lambda: clean(out))
    resume = step_to_resume(config, spec, out, record, world)
    origin = config.train.init_from if resume is None else ""
    source = world.agreed(lambda: open_source(origin, ema=config.train.init_ema)) if origin else None
    _say(config, data, world)
    task = DiffusionTask(config, spec)
    state = new_state(config, task, world)
    if resume:
        world.agreed(lambda: state_io.restore(resume[1], state))
        logger.info("resumed from %s", resume[1])
        world.from_first(lambda: set_aside_newer(out, resume[0]))
    else:
        world.agreed(lambda: _start(state, task, source))
    world.from_first(lambda: drop_newer_snapshots(out, state.step))
    world.from_first(lambda: write_json_atomic(out / RUN_CONFIG, config.to_json()))
    if state.step >= config.train.steps:
        logger.info("nothing left to do: step %d of %d is committed", state.step, config.train.steps)
        return 0
    loader = Loader(
        data, config.train.batch_size, config.train.seed, d.flip, d.workers, world.data_part, world.data_parts
    )
    track = lambda: trackers(config.track, out, config.to_json(), state.step) if world.first else []  # noqa: E731
    followers = stack.enter_context(closing(Followers(world.agreed(track))))
    watchdog = Watchdog(world, config.parallel.timeout)
    stack.enter_context(watchdog.watching())  # after the trackers: closing those may take its time
    hooks = [
        Hook(config.train.attention_every, attention_hook(task, data)),
        Hook(config.train.sample_every, sample_hook(spec, sampled, out, watchdog)),
    ]
    if heldout is None and config.heldout.every:
        logger.info("no held-out pictures: nothing is measured on any (data.heldout names a list)")
    if heldout is not None and config.heldout.num:
        hooks.insert(0, Hook(config.heldout.every, heldout_hook(task, heldout, config.heldout.num, watchdog)))
    trainer = Trainer(
        config, task, state, loader.from_step, out,
        followers.write, cut=followers.cut,
        watchdog=watchdog, hooks=hooks, data_record=record,
        flops_per_image=3.0 * forward_flops(config.model, config.model.input_size, config.model.input_size),
        peak_flops=peak_flops(world, config.train.precision),
    )  # fmt: skip
    try:
        trainer.fit()
    except Stopped as stopped:
        return stopped.code
    return 0


def _check_shares(config: RunConfig, world: World) -> None:
    """The global batch must divide over the processes, and a process's share into micro-batches."""
    batch, micro = config.train.batch_size, config.train.micro_batch_size
    share, rest = divmod(batch, world.data_parts)
    if rest:
        raise ConfigError(f"train.batch_size: {batch} does not divide over {world.data_parts} data-parallel processes")
    if micro and share % micro:
        raise ConfigError(f"train.micro_batch_size: {micro} does not divide a process's share {share} of batch {batch}")


def _spec(config: RunConfig, data: PictureSet) -> ModelSpec:
    names = data.names or None
    return ModelSpec(config.model, config.process, config.codec, ClassConditionerConfig(names), config.sampling)


def _check_sampling(spec: ModelSpec) -> Request:
    """The request of the picture grids, checked before the first step: the first classes, unguided where the model has
    no null class."""
    count = getattr(spec.model, "num_classes", 0)
    if not count:
        return check_request(spec, num=6 * SAMPLES_PER_CLASS)
    labels = [label for label in range(min(count, 16)) for _ in range(SAMPLES_PER_CLASS)]
    null = getattr(spec.model, "null_class", None)
    return check_request(spec, labels, guidance=1.0 if null is None else None)


def _start(state: TrainState, task: DiffusionTask, source: Source | None) -> None:
    """Fresh weights, or those of another checkpoint where they fit; averages begin as the weights."""
    weights, train = state.weights, state.config.train
    fill_fresh(state, task)
    if source is not None:
        theirs, ours, report = source.spec, task.spec, StartReport()
        shapes = {name: layout.shape for name, layout in zip(weights.names, weights.layouts, strict=True)}
        null, their_null = (getattr(spec.model, "null_class", None) for spec in (ours, theirs))
        tensors = source.tensors(train.init_ema)
        for start in starting_weights(tensors, shapes, ours.class_names, theirs.class_names, null, their_null, report):
            weights.put(start.name, start.value, start.rows)
        weights.publish()
        state.averages.start(weights.masters)
        logger.info("starts from %s: %s", train.init_from, report.line())
        _compare(theirs, ours)


def _compare(theirs: ModelSpec, ours: ModelSpec) -> None:
    """Say what shapes do not show: a network that reads its weights in another way has to learn them anew."""
    keys = [("model", key) for key in ("n_heads", "n_kv_heads", "rope", "qk_norm", "kind")] + [("process", None)]
    for section, key in keys:
        old, new = (spec[section] if key is None else spec[section].get(key) for spec in (theirs, ours))
        if old != new:
            logger.warning(
                "the start differs in %s: %s there, %s here", ".".join(filter(None, (section, key))), old, new
            )


def _say(config: RunConfig, data: PictureSet, world: World) -> None:
    for section, values in config.to_json().items():
        logger.info("%-9s %s", section, json.dumps(values).strip("{}").replace('"', ""))
    logger.info(
        "%s parameters, %d of %d pictures in %d classes, device %s, %d process%s (replicate %d x shard %d x tp %d)",
        f"{parameter_count(config.model):,}", len(data), data.found, len(data.names), world.device,
        world.size, "" if world.size == 1 else "es", world.replicate, world.shard, world.tp,
    )  # fmt: skip
