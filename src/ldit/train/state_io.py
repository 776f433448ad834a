"""TrainState <-> a committed step."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ldit.checkpoint.export import EMA, MODEL, read_json
from ldit.checkpoint.run import OPTIMIZER, SNAPSHOTS, STATE, TRAINER, retire
from ldit.checkpoint.save import Entry, Sets, write_folder, write_step
from ldit.checkpoint.sets import PartReader
from ldit.config.serial import convert, from_dict
from ldit.config.spec import ModelSpec
from ldit.errors import ConfigError, SourceError
from ldit.parallel.layout import Layout
from ldit.train.ema import MAIN
from ldit.train.guard import Guard, Scaler
from ldit.train.saver import Staging
from ldit.train.step import TrainState


def reserve_work(state: TrainState, staging: Staging) -> Callable[[], None]:
    """The returned function makes the host memory that saves of `state` are copied to; without it the first does."""
    values = [value for entries in _sets(state).values() for _, _, value in entries()]
    return lambda: staging.begin(values)


def save_work(
    run: Path,
    state: TrainState,
    spec: ModelSpec,
    staging: Staging,
    data: dict[str, Any] | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> Callable[[], None]:
    """Copy the state to the host now; the returned function commits the copy as a step of `run`, whenever it is
    called, and then removes steps that are not to be kept. `data` is the record of the training set."""
    train, world, step = state.config.train, state.world, state.step
    record = {"step": step, "images": step * train.batch_size}
    spec = replace(spec, training=record)
    sets = _staged(_sets(state), staging)
    trainer = {
        **record,
        "updates": state.updates,
        "offset": state.offset,
        "scaler": state.scaler.to_json(),
        "guard": {**state.guard.to_json(), "rollbacks": 0},
        "data": data,
    }

    def work() -> None:
        write_step(run, step, spec, sets, trainer, world, progress)
        world.from_first(lambda: retire(run, train.keep, train.keep_every), world.saving)

    return work


def snapshot_work(run: Path, state: TrainState, spec: ModelSpec, staging: Staging) -> Callable[[], None]:
    """The same for a snapshot of the power-function averages: RUN/snapshots/step-…, for `ldit ema`."""
    step, world = state.step, state.world
    powers = {name: track for name, track in state.averages.tracks.items() if name.startswith("power-")}
    sets = _staged({name: lambda track=track: _entries(state, track.values) for name, track in powers.items()}, staging)  # type: ignore[misc]
    spec = replace(spec, training={"step": step, "images": step * state.config.train.batch_size})
    documents = {"config.json": spec.to_json(), "snapshot.json": {"step": step, "updates": state.updates}}
    needed = sum(entry.bytes for entries in sets.values() for entry in entries)

    def work() -> None:
        write_folder(run / SNAPSHOTS / f"step-{step:08d}", sets, documents, world, needed)

    return work


def restore(folder: Path, state: TrainState) -> None:
    """Fill `state` from a verified step folder, bit for bit, whatever the number of processes that wrote it."""
    weights, place = state.weights, state.world.circle.here
    model = PartReader(folder, MODEL)
    if unknown := model.names() - set(weights.names):
        raise SourceError(f"{folder}: {sorted(unknown)[0]} does not fit the model")
    weights.fill(lambda name, layout, part: model.read(name, layout.shape, part))
    for track_name, track in state.averages.tracks.items():
        reader = PartReader(folder, _stem(track_name))
        for name, layout, part, value in zip(weights.names, weights.layouts, weights.parts, track.values, strict=True):
            value.copy_(reader.read(name, layout.shape, part))
    optimizer = PartReader(folder, OPTIMIZER)
    state.optimizer.load(lambda name, layout: optimizer.read(name, layout.shape, layout.part(*place)))
    _restore_numbers(folder, state)


def _restore_numbers(folder: Path, state: TrainState) -> None:
    path = folder / TRAINER
    record = read_json(path)
    try:
        if not isinstance(record, dict):
            raise ConfigError("not an object")
        step = convert(int, record.get("step"), "step")
        # Runs of before there were skipped steps have no more than that.
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
    return EMA if track == MAIN else f"{STATE}/{track}"


def _sets(state: TrainState) -> dict[str, Callable[[], Iterator[tuple[str, Layout, Tensor]]]]:
    masters: list[Tensor] = list(state.weights.masters)
    sets = {MODEL: lambda: _entries(state, masters)}
    for name, track in state.averages.tracks.items():
        sets[_stem(name)] = lambda track=track: _entries(state, track.values)  # type: ignore[misc]
    return {**sets, OPTIMIZER: state.optimizer.state}


def _entries(state: TrainState, values: list[Tensor]) -> Iterator[tuple[str, Layout, Tensor]]:
    return zip(state.weights.names, state.weights.layouts, values, strict=True)


def _staged(sets: dict[str, Callable[[], Iterator[tuple[str, Layout, Tensor]]]], staging: Staging) -> Sets:
    rows = {stem: list(entries()) for stem, entries in sets.items()}
    staging.begin([value for entries in rows.values() for _, _, value in entries])
    copied = {
        stem: [Entry(name, layout, staging.copy(value)) for name, layout, value in entries]
        for stem, entries in rows.items()
    }
    staging.settle()
    return copied
