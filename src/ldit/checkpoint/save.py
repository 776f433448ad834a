"""Writes a checkpoint: every rank writes some of the tensors, and the main process commits the folder.

Each rank gathers the full tensors that it writes one at a time, so it never holds more than one besides its own parts.
Files hold full tensors, so they can be read by any number of processes.
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
from ldit.storage.names import CHECKPOINTS, TRAINER
from ldit.storage.outputs import disk_error
from ldit.storage.shards import ShardWriter, shard_name, write_index

SHARD_BYTES = 1 << 30  # a larger set is split into files of about this size, at most one for each rank
T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """A tensor of a set. `part` is this rank's part, on the CPU, or on the meta device if another replica writes it."""

    name: str
    layout: Layout
    part: Tensor

    @property
    def bytes(self) -> int:
        """Size of the full tensor."""
        return math.prod(self.layout.shape) * self.part.element_size()


Sets = Mapping[str, Sequence[Entry]]
"""File stem -> tensors, with the same names in the same order on every rank."""


def write_step(
    run: Path,
    step: int,
    spec: AnySpec,
    sets: Sets,
    trainer: dict[str, Any],
    world: World,
    progress: Callable[[str], None] = lambda what: None,
) -> Path:
    """Commit RUN/checkpoints/step-…; all ranks call it, from the thread that owns `world.saving`.

    If one rank cannot write, all raise RunError; earlier checkpoints stay intact.
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
    """Commit a folder of tensor sets and JSON documents (file name -> content). Collective, as `write_step`."""
    needed = sum(entry.bytes for entries in sets.values() for entry in entries)
    commit: list[Commit] = []  # on the main process only

    def begin() -> str:
        _check_space(final, needed)
        commit.append(Commit(final))
        for name in (*sets, *documents):
            (commit[0].folder / name).parent.mkdir(exist_ok=True)
        return str(commit[0].folder)

    try:
        # The main process checks the free space and makes the temporary folder.
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

        # Every rank writes its files; if one fails, all raise.
        world.run_on_all(lambda: _explained(write, final, needed), world.saving)
        # Gather sizes and checksums, computed while writing, for the manifest.
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
        for unfinished in commit:
            unfinished.abort()
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
    """Write this rank's file of a set; returns its manifest record by name, and the error if any. A rank that cannot
    write, or should not (`writing`), still takes part in every exchange: the others wait for its parts."""
    # The tensors of each rank of the group that holds one whole model.
    owners = deal(entries, world.size)
    model_group = world.saving_model_group
    base = world.replica * len(model_group)
    queues = [
        [e for e, owner in zip(entries, owners, strict=True) if owner == base + j] for j in range(len(model_group))
    ]
    mine = queues[model_group.me]
    # Open this rank's file, if it writes any.
    failure: Exception | None = None
    writer: ShardWriter | None = None
    name = _file_of(stem, world.rank, owners) if mine else ""
    if mine and writing:
        try:
            writer = ShardWriter(folder / name, [(e.name, e.part.dtype, e.layout.shape) for e in mine])
        except Exception as error:
            failure = error
    # In each turn every rank receives one full tensor, and writes it.
    for turn in range(max(map(len, queues))):
        entries_of_turn = [queue[turn] if turn < len(queue) else None for queue in queues]
        parts = [None if e is None else e.part for e in entries_of_turn]
        full = gather_whole(parts, [None if e is None else e.layout for e in entries_of_turn], model_group)
        progress("save")
        if full is not None and writer is not None and failure is None:
            try:
                writer.add(full)
            except Exception as error:
                failure = error
    # Fsync and close.
    if writer is None:
        return {}, failure
    try:
        writer.close(failure is None)
    except Exception as error:
        failure = failure or error
    return {name: writer.record}, failure


def deal(entries: Sequence[Entry], processes: int) -> list[int]:
    """The rank that writes each tensor. Consecutive tensors share a file; files have about equal size, are as few as
    SHARD_BYTES allows, and are spread over the ranks."""
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
    """Write the index if the set has several files."""
    owners = deal(entries, processes)
    if len(set(owners)) > 1:
        files = {e.name: _file_of(stem, owner, owners) for e, owner in zip(entries, owners, strict=True)}
        write_index(folder, stem, files, sum(entry.bytes for entry in entries))


def check_space(run: Path, needed: int) -> None:
    """RunError when a checkpoint of `needed` bytes does not fit on the disk of a run directory, which exists."""
    _explained(lambda: _check_space(run / CHECKPOINTS, needed), run / CHECKPOINTS, needed)


def _check_space(final: Path, needed: int) -> None:
    make_folder(final.parent)
    free = shutil.disk_usage(final.parent).free
    if free < needed:
        raise OSError(errno.ENOSPC, "no space left")


def _explained(work: Callable[[], T], final: Path, needed: int) -> T:
    """`work()`; an OSError becomes a RunError of one line that says how many bytes a checkpoint needs."""
    try:
        return work()
    except OSError as error:
        needs = f"a checkpoint needs {needed:,} bytes"
        raise disk_error(error, final, final.parent, needs, "earlier checkpoints are intact") from None
