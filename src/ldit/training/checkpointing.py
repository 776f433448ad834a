"""Saves a TrainState as a committed step, and restores it."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ldit.checkpoint.export import EMA, MODEL
from ldit.checkpoint.run import retire
from ldit.checkpoint.save import Entry, Sets, deal, write_folder, write_step
from ldit.config.kinds import AnySpec
from ldit.config.serial import convert, from_dict
from ldit.errors import ConfigError, SourceError
from ldit.log import logger
from ldit.parallel.layout import Layout
from ldit.parallel.world import World
from ldit.storage.atomic import read_json
from ldit.storage.names import OPTIMIZER, SNAPSHOTS, STATE, TRAINER
from ldit.storage.shards import PartReader
from ldit.training.ema import MAIN, POWER
from ldit.training.guard import Guard, Scaler
from ldit.training.saver import Staging
from ldit.training.state import TrainState

_Sets = dict[str, Callable[[], Iterator[tuple[str, Layout, Tensor]]]]


def reserve_work(state: TrainState, staging: Staging) -> Callable[[], None]:
    """The returned function allocates the host memory for saves of `state`; otherwise the first save does. All ranks
    call it, from the thread that owns `world.saving`."""
    assigned = _assigned(_sets(state), state.world)
    values = [entry.part for entries in assigned.values() for entry, mine in entries if mine]
    return lambda: state.world.run_on_all(lambda: staging.begin(values), state.world.saving)


def save_work(
    run: Path,
    state: TrainState,
    spec: AnySpec,
    staging: Staging,
    data: dict[str, Any] | None = None,
    progress: Callable[[str], None] = lambda what: None,
    step: bool = True,
    snapshot: bool = False,
) -> Callable[[], None]:
    """Copy the state to the host now; the returned function writes the copy, at any later time. `data` is the record
    of the training set.

    `step`: write RUN/checkpoints/step-…, then remove steps beyond those to keep. `snapshot`: before that, write
    RUN/snapshots/step-…, the power-function averages alone, for `ldit ema`.
    """
    train, world, number, updates = state.config.train, state.world, state.step, state.updates
    record = {"step": number, "images": number * train.batch_size}
    spec = replace(spec, training={**(spec.training or {}), **record})
    # Copy the tensors: all for a step, else those of the snapshot. Training may change the state afterwards.
    powers = {name: _stem(name) for name in state.averages.tracks if name.startswith(POWER)}
    all_sets = _sets(state)
    sets = _staged(all_sets if step else {stem: all_sets[stem] for stem in powers.values()}, world, staging)
    # Copy the counters.
    trainer = {
        **record,
        "updates": updates,
        "offset": state.offset,
        "scaler": state.scaler.to_json(),
        "guard": {**state.guard.to_json(), "rollbacks": 0},
        "data": data,
    }

    def work() -> None:
        if snapshot:
            averages = {name: sets[stem] for name, stem in powers.items()}
            documents = {"config.json": spec.to_json(), "snapshot.json": {"step": number, "updates": updates}}
            write_folder(run / SNAPSHOTS / f"step-{number:08d}", averages, documents, world, progress)
        if step:
            folder = write_step(run, number, spec, sets, trainer, world, progress)
            logger.info("saved %s", folder)
            world.from_rank0(lambda: retire(run, train.keep, train.keep_every), world.saving)

    return work


def bytes_needed(state: TrainState) -> int:
    """Bytes of the tensors of a checkpoint."""
    return sum(Entry(*row).bytes for rows in _sets(state).values() for row in rows())


def restore(folder: Path, state: TrainState) -> None:
    """Fill `state` from a verified step folder, bit for bit, however many ranks wrote it."""
    weights, place = state.weights, state.world.model_group.here
    state.averages.wait()
    # Weights: every rank reads its part of each tensor.
    model = PartReader(folder, MODEL)
    if unknown := model.names() - set(weights.names):
        raise SourceError(f"{folder}: {sorted(unknown)[0]} does not fit the model")
    weights.fill(lambda name, layout, part: model.read(name, layout.shape, part))
    # Averages.
    for track_name, track in state.averages.tracks.items():
        reader = PartReader(folder, _stem(track_name))
        for name, layout, part, value in zip(weights.names, weights.layouts, weights.parts, track.values, strict=True):
            value.copy_(reader.read(name, layout.shape, part))
    # Optimiser state and counters.
    optimizer = PartReader(folder, OPTIMIZER)
    state.optimizer.load(lambda name, layout: optimizer.read(name, layout.shape, layout.part(*place)))
    _restore_numbers(folder, state)


def _restore_numbers(folder: Path, state: TrainState) -> None:
    """Counters, loss scale and guard from state/trainer.json; SourceError names what does not fit."""
    path = folder / TRAINER
    record = read_json(path)
    try:
        if not isinstance(record, dict):
            raise ConfigError("not an object")
        step = convert(int, record.get("step"), "step")
        # Older runs have the step only.
        updates = convert(int, record.get("updates", step), "updates")
        offset = convert(int, record.get("offset", 0), "offset")
        scaler = from_dict(Scaler, record["scaler"], "scaler") if "scaler" in record else state.scaler
        guard = from_dict(Guard, record.get("guard", {}), "guard")
        if min(step, updates, offset, scaler.good, guard.count, guard.left_out, guard.rollbacks, guard.variance) < 0:
            raise ConfigError("a count is negative")
        if not scaler.scale >= 1:
            raise ConfigError(f"scaler.scale: {scaler.scale}")
    except ConfigError as error:
        raise SourceError(f"{path} is not a training record: {error}") from None
    state.step, state.updates, state.offset, state.scaler, state.guard = step, updates, offset, scaler, guard


def _stem(track: str) -> str:
    """The stem of the files of an average."""
    return EMA if track == MAIN else f"{STATE}/{track}"


def _sets(state: TrainState) -> _Sets:
    """File stem -> a function that yields (name, layout, this rank's part): weights, averages, optimiser."""
    masters: list[Tensor] = list(state.weights.masters)
    sets = {MODEL: lambda: _entries(state, masters)}
    for name, track in state.averages.tracks.items():
        sets[_stem(name)] = partial(_entries, state, track.values)
    return {**sets, OPTIMIZER: state.optimizer.state}


def _entries(state: TrainState, values: list[Tensor]) -> Iterator[tuple[str, Layout, Tensor]]:
    return zip(state.weights.names, state.weights.layouts, values, strict=True)


def _assigned(sets: _Sets, world: World) -> dict[str, list[tuple[Entry, bool]]]:
    """The tensors of each set, each with whether this rank's replica writes it."""
    assigned = {}
    for stem, rows in sets.items():
        entries = [Entry(*row) for row in rows()]
        replicas = [owner // len(world.model_group) for owner in deal(entries, world.size)]
        assigned[stem] = [(entry, r == world.replica) for entry, r in zip(entries, replicas, strict=True)]
    return assigned


def _staged(sets: _Sets, world: World, staging: Staging) -> Sets:
    """Host copies of the tensors that this rank's replica writes; the others on the meta device."""
    assigned = _assigned(sets, world)
    staging.begin([entry.part for entries in assigned.values() for entry, mine in entries if mine])
    copied = {
        stem: [replace(e, part=staging.copy(e.part) if mine else e.part.detach().to("meta")) for e, mine in entries]
        for stem, entries in assigned.items()
    }
    staging.settle()
    return copied
