"""Recipe to weights: processes, data, what is trained, resume or start, hooks, loop."""

import json
from contextlib import ExitStack, closing
from pathlib import Path

from ldit.checkpoint.export import read_any_spec
from ldit.checkpoint.run import check_run_dir, clean, drop_after, quarantine_newer, run_lock
from ldit.config.autoencoder import AutoencoderRun
from ldit.config.classifier import ClassifierRun
from ldit.config.run import BaseRun, RunConfig
from ldit.data.loader import Loader
from ldit.data.samples import Samples
from ldit.data.source import open_run_data
from ldit.errors import ConfigError
from ldit.log import logger, silence_other_ranks
from ldit.parallel.watchdog import Watchdog
from ldit.parallel.world import World, joined, report_once
from ldit.precision import products
from ldit.storage.atomic import write_json_atomic
from ldit.storage.names import RUN_CONFIG, SKIPPED
from ldit.track import Trackers, check_packages, trackers
from ldit.train import checkpointing as state_io
from ldit.train.resume import step_to_resume
from ldit.train.skipped import SkippedLog
from ldit.train.step import new_state
from ldit.train.tasks.autoencoder_subject import AutoencoderSubject
from ldit.train.tasks.classifier_subject import ClassifierSubject
from ldit.train.tasks.diffusion_subject import DiffusionSubject
from ldit.train.tasks.subject import Subject, Surroundings
from ldit.train.telemetry import peak_flops
from ldit.train.trainer import Hook, Stopped, Trainer


def train(config: BaseRun, out: Path) -> int:
    """Train into `out`, or go on from its newest true step. Same command again = resume, with any number of processes.

    Returns the exit code: 0 when the last step is committed; 130, 143 or 138 when SIGINT, SIGTERM or SIGUSR1 ended the
    run after a checkpoint.
    """
    with report_once():
        config.check()
    check_packages(config.track)
    with joined(config.parallel) as world, ExitStack() as stack:
        stack.enter_context(products(config.train.precision))
        if not world.is_main:
            silence_other_ranks()
        return _train(config, out, world, stack)


def _train(config: BaseRun, out: Path, world: World, stack: ExitStack) -> int:
    _check_shares(config, world)
    d = config.data
    classes = config.model.num_classes if isinstance(config, RunConfig) else None
    share = (world.rank, world.size)
    data, heldout = world.run_on_all(lambda: open_run_data(d, classes, share))
    subject = _subject(config, out, data, world)
    record = world.from_rank0(lambda: {"pictures": len(data), "sha256": data.fingerprint(), **subject.record()})
    spec = subject.task.spec
    world.from_rank0(lambda: check_run_dir(out))
    world.from_rank0(lambda: stack.enter_context(run_lock(out)))
    world.from_rank0(lambda: clean(out))
    resume = step_to_resume(config, spec, out, record, world)
    _say(config, subject, data, world)
    state = new_state(config, subject.task, world)
    if resume:
        world.run_on_all(lambda: state_io.restore(resume[1], state))
        world.run_on_all(lambda: subject.resumed(read_any_spec(resume[1])))
        logger.info("resumed from %s", resume[1])
        world.from_rank0(lambda: quarantine_newer(out, resume[0]))
    else:
        subject.begin(state)
    world.from_rank0(lambda: drop_after(out, state.step))
    world.from_rank0(lambda: write_json_atomic(out / RUN_CONFIG, config.to_json()))
    if state.step >= config.train.steps:
        logger.info("nothing left to do: step %d of %d is committed", state.step, config.train.steps)
        return 0
    part, parts = world.data_part, world.data_parts
    loader = Loader(data, config.train.batch_size, config.train.seed, d.flip, d.workers, part, parts, d.bad, d.timeout)
    track = lambda: trackers(config.track, out, config.to_json(), state.step) if world.is_main else []  # noqa: E731
    all_trackers = stack.enter_context(closing(Trackers(world.run_on_all(track))))
    skipped = world.run_on_all(lambda: SkippedLog(out / SKIPPED) if world.is_main else None)
    skip = skipped.add if skipped else lambda faults, step: None
    watchdog = Watchdog(world, config.parallel.timeout)
    stack.enter_context(watchdog.watching())  # after the trackers: closing those may take its time
    hooks: list[Hook] = subject.hooks(Surroundings(world, data, heldout, watchdog, skip))
    trainer = Trainer(
        config, subject.task, state, loader.from_step, out,
        all_trackers.write, cut=all_trackers.cut,
        watchdog=watchdog, hooks=hooks, data_record=record,
        skip=skip,
        flops_per_image=subject.flops_per_image,
        peak_flops=peak_flops(world, config.train.precision) if subject.flops_per_image else None,
    )  # fmt: skip
    try:
        trainer.fit()
    except Stopped as stopped:
        return stopped.code
    return 0


def _subject(config: BaseRun, out: Path, data: Samples, world: World) -> Subject:
    if isinstance(config, AutoencoderRun):
        return AutoencoderSubject(config, out, data, world)
    if isinstance(config, ClassifierRun):
        return ClassifierSubject(config, out, data, world)
    assert isinstance(config, RunConfig)
    return DiffusionSubject(config, out, data, world)


def _check_shares(config: BaseRun, world: World) -> None:
    """The global batch must divide over the processes, and a process's share into micro-batches."""
    batch, micro = config.train.batch_size, config.train.micro_batch_size
    share, rest = divmod(batch, world.data_parts)
    if rest:
        raise ConfigError(f"train.batch_size: {batch} does not divide over {world.data_parts} data-parallel processes")
    if micro and share % micro:
        raise ConfigError(f"train.micro_batch_size: {micro} does not divide a process's share {share} of batch {batch}")


def _say(config: BaseRun, subject: Subject, data: Samples, world: World) -> None:
    for section, values in config.to_json().items():
        logger.info("%-9s %s", section, json.dumps(values).strip("{}").replace('"', ""))
    logger.info(
        "%s, %d of %d images in %d classes, device %s, %d process%s (replicate %d x shard %d x tp %d)",
        subject.describe(), len(data), data.found, len(data.names), world.device,
        world.size, "" if world.size == 1 else "es", world.replicate, world.shard, world.tp,
    )  # fmt: skip
