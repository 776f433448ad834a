"""`ldit train`: from a configuration to weights, in four phases: prepare, claim, build, run."""

import json
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ldit.checkpoint.export import read_any_spec
from ldit.checkpoint.run import (
    begun_with,
    check_run_dir,
    clean,
    committed_steps,
    drop_after,
    latest_valid_step,
    quarantine_newer,
    run_lock,
)
from ldit.checkpoint.save import check_space
from ldit.commands.finetune import experiment_of
from ldit.commands.train_data import open_training_data, warn_of_turned
from ldit.commands.train_hooks import check_sampling, sampling_hooks
from ldit.config.autoencoder import AutoencoderRun
from ldit.config.classifier import ClassifierRun
from ldit.config.experiment import Experiment
from ldit.config.model import OriginalDiTConfig, TextModelConfig
from ldit.config.paths import expanded
from ldit.config.recipes.registry import is_run_directory
from ldit.config.run import BaseRun, RunConfig
from ldit.data.formats.heldout import HELDOUT, share_of
from ldit.data.loader import Loader
from ldit.data.samples import Samples
from ldit.data.source import OBJECT, keep_index
from ldit.errors import ConfigError
from ldit.log import logger, silence_other_ranks
from ldit.nn.kernels import attention_kernels, software
from ldit.parallel.watchdog import Watchdog
from ldit.parallel.world import World, joined, report_once
from ldit.precision import COMPUTE, products
from ldit.readable import size
from ldit.storage.atomic import write_json_atomic
from ldit.storage.names import RUN_CONFIG, SKIPPED
from ldit.storage.outputs import put, refuse_inside
from ldit.storage.signals import Stopped
from ldit.track import Trackers, check_packages, trackers
from ldit.training import checkpointing
from ldit.training.narrator import Narrator
from ldit.training.resume import check_same_run
from ldit.training.skipped import SkippedLog
from ldit.training.state import TrainState
from ldit.training.step import new_state
from ldit.training.tasks.task import HookContext, Task
from ldit.training.telemetry import peak_flops
from ldit.training.trainer import Trainer

if TYPE_CHECKING:
    from ldit.data.user_set import UserData

# The task of each kind of run: function(experiment, data, device) -> Task, or its name "module:function", which is
# imported when such a run starts. A new kind of model to train is one entry here.
TASKS: dict[type[BaseRun], str | Callable[[Experiment, Samples, torch.device], Task]] = {
    RunConfig: "ldit.training.tasks.diffusion:open_diffusion",
    AutoencoderRun: "ldit.training.tasks.autoencoder:open_autoencoder",
    ClassifierRun: "ldit.training.tasks.classifier:open_classifier",
}


MANY_MICRO = 16  # micro-batches of a step


def train(config: str | BaseRun | Experiment, out: str | Path | None = None, data: "UserData | None" = None) -> Path:
    """Train into the run directory `out`, and return `out`. The same call again resumes, with any number of processes.

    `config` is a string ("tiny-cpu", "my.py:recipe", a model to fine-tune, or a run directory, which then is `out`), a
    RunConfig or the configuration of another kind of run, or an Experiment. `data` is a data set object, used instead
    of `data.path`. SIGINT, SIGTERM and SIGUSR1 save a checkpoint and then raise `ldit.storage.signals.Stopped`, a
    KeyboardInterrupt.
    Errors that the user can fix are an `ldit.errors.LditError` of one line. Progress goes to the logger "ldit":
    `logging.basicConfig(level=logging.INFO)` shows it.
    """
    # Make an experiment of whatever was given.
    if isinstance(config, str):
        config = expanded(config)
    if out is None:
        if not isinstance(config, str) or not is_run_directory(config):
            raise ConfigError("out: name the run directory")
        out = config
    if isinstance(config, str):
        config = experiment_of(config)
    experiment = config if isinstance(config, Experiment) else Experiment(config=config)
    if data is not None:
        experiment = replace(experiment, data=data)
    # Check what needs no other process, then start them together.
    out, experiment = expanded(Path(out)), replace(experiment, config=expanded(experiment.config))
    with report_once():
        experiment = _named(experiment)
        begun = begun_with(out, "train", "warmup")
        experiment = replace(
            experiment, config=experiment.config.with_warmup(begun if isinstance(begun, int) else None)
        )
        experiment.config.check()
        check_packages(experiment.config.track)
    with joined(experiment.config.parallel) as world, ExitStack() as stack:
        stack.enter_context(products(experiment.config.train.precision))
        if not world.is_main:
            silence_other_ranks()
        _train(experiment, out, world, stack)
    return out


def _train(experiment: Experiment, out: Path, world: World, stack: ExitStack) -> None:
    """The four phases. If one fails on any rank, every rank raises before the next phase begins."""
    prepared = world.run_on_all(lambda: _prepare(experiment, out, world))
    claim = world.from_rank0(lambda: _claim(prepared, out, stack))
    resume = latest_valid_step(out, world) if claim["steps"] else None
    state = world.run_on_all(lambda: _build(prepared, out, claim, resume, world))
    _run(prepared, out, claim["record"], state, resume, world, stack)


def _named(experiment: Experiment) -> Experiment:
    """The experiment with its data set object's name as `data.path`: `ldit train RUN` then knows that the run needs an
    object."""
    if experiment.data is None:
        return experiment
    kind = type(experiment.data)
    section = replace(experiment.config.data, path=f"{OBJECT}{kind.__module__}.{kind.__qualname__}")
    return replace(experiment, config=replace(experiment.config, data=section))


@dataclass(frozen=True)
class _Prepared:
    """The parts of a run, opened and checked."""

    config: BaseRun
    data: Samples
    heldout: Samples | None
    task: Task


def _prepare(experiment: Experiment, out: Path, world: World) -> _Prepared:
    """Phase 1, on every rank, without side effects: open data and codec, and check all that can be checked."""
    config = experiment.config
    _check_shares(config, world)
    # The data first: the task checks that its network fits them.
    data, heldout = open_training_data(experiment, out, world)
    if isinstance(config, RunConfig):
        config = config.fitted(len(data.names))
        experiment = replace(experiment, config=config)
    if world.is_main and not config.data.exif:
        warn_of_turned(data)
    open_task = TASKS[type(config)]
    if isinstance(open_task, str):
        module, _, function = open_task.partition(":")
        open_task = getattr(import_module(module), function)
    task: Task = open_task(experiment, data, world.device)
    check_sampling(task)
    return _Prepared(config, data, heldout, task)


def _claim(prepared: _Prepared, out: Path, stack: ExitStack) -> dict[str, Any]:
    """Phase 2, on the main process: check and lock the run directory, and list its steps. Nothing in it is changed: it
    may turn out to be another run's."""
    check_run_dir(out)
    steps = [step for step, _ in committed_steps(out)]
    refuse_inside(out, [prepared.data.root], may_contain=bool(steps))
    stack.enter_context(run_lock(out))
    # What identifies the training set; it is committed with every step and compared at a resume.
    data = prepared.data
    record = {"pictures": len(data), "sha256": data.fingerprint(), **prepared.task.record()}
    return {"record": record, "steps": steps}


def _build(
    prepared: _Prepared, out: Path, claim: dict[str, Any], resume: tuple[int, Path] | None, world: World
) -> TrainState:
    """Phase 3, on every rank: allocate network, masters, optimiser and averages; restore them from a step, or
    initialise them for a new run."""
    # Refuse a directory of another run, or of this one with settings that must not change.
    config, task = prepared.config, prepared.task
    check_same_run(config, task.spec, out, claim["record"], resume, bool(claim["steps"]))
    # Allocate, then fill.
    state = new_state(config, task, world)
    if resume is None:
        task.begin(state)
    else:
        checkpointing.restore(resume[1], state)
        task.resumed(read_any_spec(resume[1]))
        logger.info("resumed from %s", resume[1])
    _log_start(prepared, out, state)
    _warn_of_gathering(config, state)
    return state


def _warn_of_gathering(config: BaseRun, state: TrainState) -> None:
    """Warn where small micro-batches make weights travel more than they compute."""
    world, micro = state.world, config.train.micro_batch_size
    count = config.train.batch_size // world.data_parts // micro if micro else 1
    if world.shard < 2 or count < MANY_MICRO:
        return
    numbers = sum(torch.Size(layout.shape).numel() for layout in state.weights.layouts)
    each = size(numbers * state.weights.compute.itemsize * (2 if config.parallel.reshard else 1))
    logger.warning(
        "train.micro_batch_size %d: %d micro-batches a step, and each gathers %s of weights; a larger one, or none, is "
        "faster where memory allows", micro, count, each,
    )  # fmt: skip


def _run(
    prepared: _Prepared,
    out: Path,
    record: dict[str, Any],
    state: TrainState,
    resume: tuple[int, Path] | None,
    world: World,
    stack: ExitStack,
) -> None:
    """Phase 4: open the run's files on the main process, then train to the end."""
    config, task, data = prepared.config, prepared.task, prepared.data
    needed = checkpointing.bytes_needed(state)

    def open_files() -> tuple[Trackers, SkippedLog | None]:
        """Open the run's files. Except the tensors of checkpoints, only the main process writes into the directory."""
        if not world.is_main:
            return Trackers([]), None
        clean(out)  # leftovers of a run that was killed
        keep_index(data, out)  # of tar archives, so that the next start reads no headers
        if resume is not None:
            quarantine_newer(out, resume[0])
        if state.step < config.train.steps:
            check_space(out, needed)  # before the first step, not after hours
        drop_after(out, state.step)  # EMA snapshots of later steps, left after a rollback or damage
        if state.step <= config.train.steps:  # else the run has gone further already
            write_json_atomic(out / RUN_CONFIG, config.to_json())
        if share_of(config.data.heldout) is not None and prepared.heldout is not None:
            names = [prepared.heldout.where(index) for index in range(len(prepared.heldout))]
            put(out / HELDOUT, "\n".join(names) + "\n")
        if state.step >= config.train.steps:
            return Trackers([]), None
        return Trackers(trackers(config.track, out, config.to_json(), state.step), out), SkippedLog(out / SKIPPED)

    metrics, skipped = world.run_on_all(open_files)
    # A finished run has nothing to do.
    if state.step >= config.train.steps:
        if state.step == config.train.steps:
            logger.info("nothing left to do: step %d of %d is committed", state.step, config.train.steps)
        else:
            logger.info("nothing left to do: step %d is committed, train.steps is %d", state.step, config.train.steps)
        logger.info("%s", _next(config, out))
        return
    # What the trainer needs: trackers, watchdog, hooks, and this rank's share of the batches.
    stack.enter_context(closing(metrics))
    skip = skipped.add if skipped else lambda faults, step: None
    watchdog = Watchdog(world, config.parallel.timeout)
    stack.enter_context(watchdog.watching())  # entered last, so that it ends first: closing trackers may take long
    context = HookContext(out, world, data, prepared.heldout, watchdog, skip)
    d = config.data
    loader = Loader(
        data, config.train.batch_size, config.train.seed, d.flip, d.workers,
        world.data_part, world.data_parts, d.bad, d.timeout,
    )  # fmt: skip
    # Train, with attention kernels that are right for the network's heads and tokens.
    if (shape := _attention(config)) is not None:
        stack.enter_context(attention_kernels(world.device, COMPUTE[config.train.precision], *shape)())
    narrator = Narrator(state.step, config.train.steps, config.train.batch_size, len(data)) if world.is_main else None
    if narrator is not None:
        stack.enter_context(closing(narrator))
    trainer = Trainer(
        config, task, state, loader.from_step, out,
        metrics.write, cut=metrics.cut,
        narrator=narrator,
        watchdog=watchdog, hooks=[*task.hooks(context), *sampling_hooks(task, context)], data_record=record,
        skip=skip, received=context.received, show=metrics.show,
        flops_per_image=task.flops_per_image,
        peak_flops=peak_flops(world, config.train.precision) if task.flops_per_image else None,
    )  # fmt: skip
    trainer.fit()
    logger.info("%s", _next(config, out))


def _check_shares(config: BaseRun, world: World) -> None:
    """The global batch must divide over the ranks, and a rank's share into micro-batches."""
    batch, micro = config.train.batch_size, config.train.micro_batch_size
    share, rest = divmod(batch, world.data_parts)
    if rest:
        raise ConfigError(f"train.batch_size: {batch} does not divide over {world.data_parts} data-parallel processes")
    if micro and share % micro:
        raise ConfigError(f"train.micro_batch_size: {micro} does not divide a process's share {share} of batch {batch}")


def _log_start(prepared: _Prepared, out: Path, state: TrainState) -> None:
    """What is about to be trained, in five lines; the whole configuration at level DEBUG."""
    config, data, heldout, world = prepared.config, prepared.data, prepared.heldout, state.world
    for section, values in config.to_json().items():
        logger.debug("%-9s %s", section, json.dumps(values).strip("{}").replace('"', ""))
    train, classes = config.train, f" in {len(data.names)} classes" if data.names else ""
    capped = f" of {data.num_before_cap:,}" if data.num_before_cap > len(data) else ""
    kept = f", {len(heldout):,} held out" if heldout is not None else ""
    logger.info("model   %s, %s", prepared.task.describe(), train.precision)
    logger.info("data    %s: %s%s images%s%s", config.data.path, f"{len(data):,}", capped, classes, kept)
    epochs = train.steps * train.batch_size / len(data)
    logger.info("steps   %s of %d images: %.3g epochs", f"{train.steps:,}", train.batch_size, epochs)
    layout = f" (replicate {world.replicate} x shard {world.shard} x tp {world.tp})" if world.size > 1 else ""
    made_of = software(world.device, COMPUTE[train.precision], *(_attention(config) or ()))
    plural = "" if world.size == 1 else "es"
    logger.info("device  %s, %d process%s%s, %s", world.device, world.size, plural, layout, made_of)
    if config.optim.moments != "fp32":
        logger.info("moments %s", state.optimizer.adamw.describe())
    logger.info("out     %s%s", out, f", from step {state.step}" if state.step else "")


def _attention(config: BaseRun) -> tuple[int, set[int]] | None:
    """(width of a head, numbers of tokens) of a diffusion model's attention; None for other networks."""
    if not isinstance(config, RunConfig):
        return None
    model, factor = config.model, config.codec.factor
    if isinstance(model, TextModelConfig):
        return model.head_dim, {model.max_seq_len}
    sides = {model.input_size, *(stage.size // factor for stage in config.stages)}
    front = 0 if isinstance(model, OriginalDiTConfig) else model.class_tokens
    patches = {model.patch_size, model.side_unit}  # the trunk's are larger where there are two levels
    counts = {(side // patch) ** 2 for side in sides for patch in patches}
    routed = {max(1, round(count * (1 - config.objective.route))) for count in counts}
    return model.head_dim, {front + count for count in counts | routed}


def _next(config: BaseRun, out: Path) -> str:
    """What to type after a run."""
    if isinstance(config, AutoencoderRun):
        return f"ldit convert {out} CODEC --to diffusers makes a codec of it"
    if isinstance(config, ClassifierRun):
        return f"it is an extractor of evaluation: ldit evaluate … --extractor {out}"
    return f"ldit sample {out} samples from it, ldit plot {out} draws its curves"


def run(config: str | BaseRun | Experiment, out: Path) -> int:
    """`train` for the command line: the exit code, 0 or that of the signal that stopped the run."""
    try:
        train(config, out)
    except Stopped as stopped:
        logger.info("stopped by %s; the checkpoint is saved, rerun the same command to resume", stopped)
        return stopped.code
    return 0
