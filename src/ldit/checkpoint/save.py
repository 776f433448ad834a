"""Saving: every process writes some of the tensors, and the main process commits the folder.

Each process gathers the tensors dealt to it whole, one at a time, so none holds more than one besides its own parts.
Files hold full tensors: neither a reader nor a resumed run cares how many processes there were.
"""

import errno
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from ldit.checkpoint.export import CONFIG
from ldit.checkpoint.run import step_folder
from ldit.config.kinds import AnySpec
from ldit.parallel.exchange import gather_whole
from ldit.parallel.layout import Layout
from ldit.parallel.world import World
from ldit.storage.atomic import Commit, make_folder, write_json
from ldit.storage.manifest import Record
from ldit.storage.names import TRAINER
from ldit.storage.outputs import disk_error
from ldit.storage.shards import ShardWriter, shard_name, write_index

SHARD_BYTES = 1 << 30  # a set is split over this many bytes a file, and into no more files than there are processes
T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """A tensor of a set: this process's part of it, on the CPU; on the meta device where another replica writes it."""

    name: str
    layout: Layout
    part: Tensor

    @property
    def bytes(self) -> int:
        """Of the full tensor."""
        return math.prod(self.layout.shape) * self.part.element_size()


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

    When one process cannot write, RunError on all of them; earlier checkpoints are intact.
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
    commit: list[Commit] = []  # of the main process

    def begin() -> str:
        _check_space(final, needed)
        commit.append(Commit(final))
        for name in (*sets, *documents):
            (commit[0].folder / name).parent.mkdir(exist_ok=True)
        return str(commit[0].folder)

    try:
        # The main process makes the temporary folder, after a look at the free space.
        folder = Path(world.from_rank0(lambda: _explained(begin, final, needed), world.saving))
        records: dict[str, Record] = {}

        def write() -> None:
            failure: Exception | None = None
            for stem, entries in sets.items():
                written, error = _write_set(folder, stem, entries, world, progress, failure is None)
                records.update(written)
                failure = failure or error
            if failure is not None:
                raise failure

        # All write their files; if one fails, every process raises.
        world.run_on_all(lambda: _explained(write, final, needed), world.saving)
        # Sizes and checksums, taken while writing, go to the main process for the manifest.
        known = {name: Record(*pair) for own in world.gather(records, world.saving) for name, pair in own.items()}

        def finish() -> None:
            for name, document in documents.items():
                write_json(folder / name, document)
            for stem, entries in sets.items():
                _write_index(folder, stem, entries, world.size)
            commit[0].finish(known)

        # The main process adds the small files and the manifest, fsyncs, and renames the folder.
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
    """Write this process's file of a set; its record by name, and what went wrong. A process that cannot write, or is
    not to (`writing`), still takes part in the exchange to its end: the others wait for what it holds."""
    # Who writes what: a queue of tensors for each member of the group that holds one whole model.
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
    # In each turn every member gets one tensor whole, and writes it.
    for turn in range(max(map(len, queues))):
        dealt = [queue[turn] if turn < len(queue) else None for queue in queues]
        parts = [None if e is None else e.part for e in dealt]
        whole = gather_whole(parts, [None if e is None else e.layout for e in dealt], model_group)
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


def _write_index(folder: Path, stem: str, entries: Sequence[Entry], processes: int) -> None:
    """The index of a set of several files."""
    owners = deal(entries, processes)
    if len(set(owners)) > 1:
        files = {e.name: _file_of(stem, owner, owners) for e, owner in zip(entries, owners, strict=True)}
        write_index(folder, stem, files, sum(entry.bytes for entry in entries))


def _check_space(final: Path, needed: int) -> None:
    make_folder(final.parent)
    free = shutil.disk_usage(final.parent).free
    if free < needed:
        raise OSError(errno.ENOSPC, "no space left")


def _explained(work: Callable[[], T], final: Path, needed: int) -> T:
    """`work()`, with errors of the file system as one line that says what a checkpoint needs."""
    try:
        return work()
    except OSError as error:
        needs = f"a checkpoint needs {needed:,} bytes"
        raise disk_error(error, final, final.parent, needs, "earlier checkpoints are intact") from None
