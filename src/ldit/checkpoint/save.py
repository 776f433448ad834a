"""One step of a run to the disk, from as many processes as there are: each writes the tensors it was dealt, whole; the
first commits. Files hold full tensors, so neither a reader nor a resumed run cares how many processes there were."""

import errno
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ldit.checkpoint.export import CONFIG
from ldit.checkpoint.run import step_folder
from ldit.config.kinds import AnySpec
from ldit.errors import RunError
from ldit.parallel.exchange import collect
from ldit.parallel.layout import Layout
from ldit.parallel.world import World
from ldit.storage.atomic import Commit, make_folder, write_json
from ldit.storage.manifest import Record
from ldit.storage.names import TRAINER
from ldit.storage.shards import ShardWriter, shard_name, write_index

SHARD_BYTES = 1 << 30  # a set is split over this many bytes a file, and no further than processes go
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Entry:
    """A tensor of a set: this process's part of it, on the CPU; on the meta device where another replica writes it."""

    name: str
    layout: Layout
    part: Tensor

    @property
    def bytes(self) -> int:
        return _numel(self.layout.shape) * self.part.element_size()


Sets = Mapping[str, Sequence[Entry]]
"""Stem of the files -> tensors; every process names the same ones in the same order."""


def write_step(
    run: Path,
    step: int,
    spec: AnySpec,
    sets: Sets,
    trainer: dict[str, Any],
    world: World,
    progress: Callable[[str], None] = lambda what: None,
) -> Path:
    """Commit RUN/checkpoints/step-…; all processes call it, from the thread that owns `world.saving`.

    RunError on all of them, with what stood before intact, when one cannot write.
    """
    final = step_folder(run, step)
    return write_folder(final, sets, {CONFIG: spec.to_json(), TRAINER: trainer}, world, progress)


def write_folder(
    final: Path,
    sets: Sets,
    documents: Mapping[str, Any],
    world: World,
    progress: Callable[[str], None] = lambda what: None,
) -> Path:
    """Commit a folder of tensor sets and JSON documents."""
    needed = sum(entry.bytes for entries in sets.values() for entry in entries)
    commit: list[Commit] = []

    def begin() -> str:
        _room(final, needed)
        commit.append(Commit(final))
        for name in (*sets, *documents):
            (commit[0].folder / name).parent.mkdir(exist_ok=True)
        return str(commit[0].folder)

    try:
        folder = Path(world.from_rank0(lambda: _explained(begin, final, needed), world.saving))
        records: dict[str, Record] = {}

        def write() -> None:
            failure: Exception | None = None
            for stem, entries in sets.items():
                found, fault = _write_set(folder, stem, entries, world, progress, failure is None)
                records.update(found)
                failure = failure or fault
            if failure is not None:
                raise failure

        world.run_on_all(lambda: _explained(write, final, needed), world.saving)
        known = {name: Record(*pair) for found in world.gather(records, world.saving) for name, pair in found.items()}

        def finish() -> None:
            for name, document in documents.items():
                write_json(folder / name, document)
            for stem, entries in sets.items():
                _index(folder, stem, entries, world.size)
            commit[0].finish(known)

        world.from_rank0(lambda: _explained(finish, final, needed), world.saving)
    except BaseException:
        for one in commit:
            one.abort()
        raise
    return final


def _write_set(
    folder: Path,
    stem: str,
    entries: Sequence[Entry],
    world: World,
    progress: Callable[[str], None],
    writing: bool = True,
) -> tuple[dict[str, Record], Exception | None]:
    """Write this process's files of a set; returns their records and what went wrong. A process that cannot write, or
    no longer wants to, still takes part in the exchange to its end: the others wait for what it holds."""
    owners = deal(entries, world.size)
    model_group = world.saving_model_group
    base = world.replica * len(model_group)
    queues = [
        [e for e, owner in zip(entries, owners, strict=True) if owner == base + j] for j in range(len(model_group))
    ]
    mine = queues[model_group.me]
    failure: Exception | None = None
    writer: ShardWriter | None = None
    name = _file_of(stem, world.rank, owners) if mine else ""
    if mine and writing:
        try:
            writer = ShardWriter(folder / name, [(e.name, e.part.dtype, e.layout.shape) for e in mine])
        except Exception as error:
            failure = error
    for turn in range(max(map(len, queues))):
        dealt = [queue[turn] if turn < len(queue) else None for queue in queues]
        parts = [None if e is None else e.part for e in dealt]
        whole = collect(parts, [None if e is None else e.layout for e in dealt], model_group)
        progress("save")
        if whole is not None and writer is not None and failure is None:
            try:
                writer.add(whole)
            except Exception as error:
                failure = error
    if writer is None:
        return {}, failure
    try:
        writer.close(failure is None)
    except Exception as error:
        failure = failure or error
    return {name: writer.record}, failure


def deal(entries: Sequence[Entry], processes: int) -> list[int]:
    """The process that writes each tensor: neighbours together, about equal bytes each, as few files as SHARD_BYTES
    allows, spread over all processes."""
    total = sum(entry.bytes for entry in entries)
    files = min(processes, max(1, -(-total // SHARD_BYTES)))
    owners, before = [], 0
    for entry in entries:
        file = min(before * files // max(total, 1), files - 1)
        owners.append(file * processes // files)
        before += entry.bytes
    return owners


def _file_of(stem: str, owner: int, owners: Sequence[int]) -> str:
    files = sorted(set(owners))
    return shard_name(stem, files.index(owner), len(files))


def _index(folder: Path, stem: str, entries: Sequence[Entry], processes: int) -> None:
    owners = deal(entries, processes)
    if len(set(owners)) > 1:
        files = {e.name: _file_of(stem, owner, owners) for e, owner in zip(entries, owners, strict=True)}
        write_index(folder, stem, files, sum(entry.bytes for entry in entries))


def _room(final: Path, needed: int) -> None:
    make_folder(final.parent)
    free = shutil.disk_usage(final.parent).free
    if free < needed:
        raise OSError(errno.ENOSPC, "no space left", str(final))


def _explained(work: Callable[[], Any], final: Path, needed: int) -> Any:
    """`work()`, with faults of the file system as one line that says what a checkpoint needs."""
    try:
        return work()
    except OSError as error:
        what = error.strerror or str(error)
        if error.errno in _FULL:
            free = shutil.disk_usage(final.parent).free
            what = f"{what}: a checkpoint needs {needed:,} bytes, {free:,} are free"
        raise RunError(f"{final} was not saved: {what}; checkpoints before it are intact") from None


def _numel(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
