"""A latent cache in the making: several processes, each with shards of its own, any of which may die at any time.

CACHE/encode.json, written first, says what is made; a process that would make something else is refused. A shard is
written beside its name, pushed to the disk and renamed; then its sidecar shard-00000.json, a manifest of that file
alone, says that it stands. When all sidecars are there whoever sees it writes the manifest and removes what only the
making needed. A shard without its sidecar is made again, so nothing has to be undone after a death.

All changes of names happen under a lock on the folder, which the kernel frees when its holder dies. A temporary file is
locked by its writer for as long as it lives, so the remains of the dead can be told from the work of the living, on
other machines too. On a file system without locks the remains stay until the cache is whole; two processes at the same
shard then both write it, with the same bytes.
"""

import errno
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from ldit.config.serial import to_dict
from ldit.data.latent_cache.description import (
    HELDOUT,
    KEY,
    CacheDescription,
    ShardRecord,
    SourceRecord,
    is_bookkeeping,
    read_description,
    shard_file,
)
from ldit.data.latent_cache.job import JOB, Part, compare, job_of
from ldit.errors import DataError, RunError, SourceError
from ldit.log import logger
from ldit.storage import manifest
from ldit.storage.atomic import fsync, make_folder, replaced, write_json
from ldit.storage.locks import held_by_other, hold, locked
from ldit.storage.manifest import Record
from ldit.storage.shards import ShardWriter

T = TypeVar("T")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Standing:
    """What a sidecar says of its shard."""

    record: Record
    rows: int
    skipped: tuple[tuple[str, str], ...]


class Making:
    """The cache that `job` describes, in `out`; `heldout` describes its held-out part."""

    def __init__(self, out: Path, job: CacheDescription, heldout: SourceRecord | None) -> None:
        self.out, self.job = out, job
        self.parts = [Part(out, job)]
        if heldout is not None:
            self.parts.append(Part(out / HELDOUT, replace(job, source=heldout, heldout=None)))

    def _call_codec(self, name: str) -> None:
        """The same codec may have lain elsewhere when the cache was begun: its first name stays."""
        parts = [replace(p, job=replace(p.job, codec=replace(p.job.codec, name=name))) for p in self.parts]
        self.job, self.parts = parts[0].job, parts

    def begin(self) -> bool:
        """Whether there is anything to do. RequestError when the folder is that of another job, with both values."""
        make_folder(self.out)
        with locked(self.out) as held:
            if self.whole():
                compare(self.out, read_description(self.out)[0], self.job)
                self._sweep()
                return False
            try:
                begun = manifest.read_body(self.out, JOB).get(KEY) or {}
            except SourceError as error:
                if (self.out / JOB).exists():
                    raise SourceError(f"{error}; remove the folder and start again") from None
                _write(self.out / JOB, manifest.sealed({}, {KEY: job_of(self.job)}))
            else:
                compare(self.out, begun, self.job)
                self._call_codec(begun["codec"]["name"])
            for part in self.parts:
                make_folder(part.folder)
            if held:
                self._remove_dead()
        return True

    def whole(self) -> bool:
        return (self.out / manifest.NAME).exists()

    def shards(self) -> list[tuple[Part, int]]:
        """All shards of all parts, in the order in which they are dealt to processes."""
        return [(part, number) for part in self.parts for number in range(len(part.ranges))]

    def images_done(self) -> int:
        """Images of the shards that have a sidecar, whoever made them."""
        done = 0
        for part in self.parts:
            with suppress(FileNotFoundError):
                names = set(os.listdir(part.folder))
                done += sum(len(r) for i, r in enumerate(part.ranges) if _sidecar(part, i).name in names)
        return done

    def stands(self, part: Part, number: int) -> bool:
        """Whether a shard is there and has the size and checksum of its sidecar; a damaged one loses its sidecar, with
        a warning."""
        found = self._standing(part, number)
        if found is None:
            return False
        path = part.folder / shard_file(number)
        with suppress(FileNotFoundError):
            if path.stat().st_size == found.record.size and manifest.sha256_file(path) == found.record.sha256:
                return True
        logger.warning("%s does not match its checksum and is made again", path)
        with locked(self.out):
            if not self.whole() and self._standing(part, number) == found:
                _sidecar(part, number).unlink(missing_ok=True)
        return False

    def write(
        self, part: Part, number: int, mean: Tensor, logvar: Tensor, label: Tensor, skipped: list[tuple[str, str]]
    ) -> None:
        """Put a shard in its place: `mean` and `logvar` (N, 2, C, h, w) in the cache's dtype, `label` (N) int64.
        RunError says what it needs when the disk is full; whatever ends this, the temporary file goes."""
        path, needed = part.folder / shard_file(number), part.bytes(len(label))

        def work() -> None:
            if shutil.disk_usage(part.folder).free < needed:
                raise OSError(errno.ENOSPC, "no space left")
            with self._temporary(path) as temporary:
                entries = [("mean", mean), ("logvar", logvar), ("label", label)]
                with ShardWriter(temporary, [(name, t.dtype, tuple(t.shape)) for name, t in entries]) as writer:
                    for _, tensor in entries:
                        writer.add(tensor)
                self._publish(part, number, temporary, Standing(writer.record, len(label), tuple(skipped)))

        self._explained(work, path, needed)

    def finish(self) -> bool:
        """Whether the cache is whole now: if all shards stand the manifests are written, held-out first, and what only
        the making needed is removed. DataError when nothing could be read."""
        return self._explained(self._finish, self.out, 0)

    def _finish(self) -> bool:
        with locked(self.out):
            if not self.whole():
                found = [self._all_standing(part) for part in self.parts]
                standing = [shards for shards in found if shards is not None]
                if len(standing) < len(found):
                    return False
                sealed: dict[str, Record] = {}
                for part, shards in reversed(list(zip(self.parts, standing, strict=True))):
                    own = _seal(part, shards, sealed)
                    place = part.folder.relative_to(self.out)
                    sealed |= {(place / file).as_posix(): record for file, record in own.items()}
            self._sweep()
        return True

    def _all_standing(self, part: Part) -> list[Standing] | None:
        """What the sidecars of a part say; None while shards are missing."""
        found: list[Standing] = []
        for number in range(len(part.ranges)):
            path, one = part.folder / shard_file(number), self._standing(part, number)
            if one is None:
                return None
            if not path.is_file() or path.stat().st_size != one.record.size:
                logger.warning("%s is not what its sidecar says; the same command makes it again", path)
                _sidecar(part, number).unlink()
                return None
            found.append(one)
        return found

    def _standing(self, part: Part, number: int) -> Standing | None:
        """What the sidecar of a shard says; None, with a warning if it is damaged, when there is none."""
        path = _sidecar(part, number)
        try:
            body = manifest.read_body(part.folder, path.name)
            record = Record(**body["files"][shard_file(number)])
            skipped = tuple((where, reason) for where, reason in body["skipped"])
            return Standing(record, int(body["rows"]), skipped)
        except (SourceError, KeyError, TypeError, ValueError) as error:
            if path.exists():
                logger.warning("%s is damaged (%s): its shard is made again", path, error)
            return None

    def _publish(self, part: Part, number: int, temporary: Path, standing: Standing) -> None:
        """Name a shard that is on the disk, and say that it stands. The first one there stays: a reader may have it
        open already, and the bits of another machine may differ."""
        with locked(self.out):
            if self.whole() or self._standing(part, number) is not None:
                return
            _sidecar(part, number).unlink(missing_ok=True)
            os.replace(temporary, part.folder / shard_file(number))
            fsync(part.folder)
            said = {"rows": standing.rows, "skipped": to_dict(standing.skipped)}
            _write(_sidecar(part, number), manifest.sealed({shard_file(number): standing.record}, said))

    @contextmanager
    def _temporary(self, path: Path) -> Iterator[Path]:
        """The name of a new file beside `path`, locked as long as this process works at it."""
        temporary = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:8]}")
        descriptor = -1
        try:
            with locked(self.out):
                temporary.touch(exist_ok=False)
                descriptor = hold(temporary)
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)
            if descriptor >= 0:
                os.close(descriptor)

    def _remove_dead(self) -> None:
        """Remove temporary files whose writers are no more. JSON files are written under the lock that we hold."""
        for part in self.parts:
            for path in part.folder.glob("*.tmp-*"):
                if is_bookkeeping(path.name) and not held_by_other(path):
                    path.unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Remove all that only the making needed. Who still writes a shard finds that the cache is whole."""
        for part in reversed(self.parts):
            if part.folder.is_dir():
                left = sorted(filter(is_bookkeeping, os.listdir(part.folder)), key=lambda name: (name == JOB, name))
                for name in left:
                    (part.folder / name).unlink(missing_ok=True)
                if left:
                    fsync(part.folder)

    def _explained(self, work: Callable[[], T], path: Path, needed: int) -> T:
        """`work()`, with faults of the file system as one line that says what is needed."""
        try:
            return work()
        except OSError as error:
            what = error.strerror or str(error)
            if error.errno in _FULL and needed:
                whole = sum(part.bytes(part.job.source.pictures) for part in self.parts)
                what += f": it needs {needed:,} bytes (the whole cache {whole:,})"
                with suppress(OSError):
                    what += f", {shutil.disk_usage(self.out).free:,} are free"
            raise RunError(
                f"{path} was not written: {what}; what stands is intact, and the same command goes on"
            ) from None


def _seal(part: Part, standing: list[Standing], below: dict[str, Record]) -> dict[str, Record]:
    """Write a part's manifest, which lists what is `below` it too; the records of the part's own files."""
    shards = tuple(
        ShardRecord(shard_file(number), rows.start, rows.stop, one.rows)
        for number, (rows, one) in enumerate(zip(part.ranges, standing, strict=True))
    )
    cache = replace(part.job, skipped=tuple(pair for one in standing for pair in one.skipped), shards=shards)
    if not cache.rows:
        raise DataError(f"{part.folder}: none of its {cache.source.pictures} images could be encoded")
    records = {shard.file: one.record for shard, one in zip(shards, standing, strict=True)}
    path = part.folder / manifest.NAME
    _write(path, manifest.sealed({**records, **below}, {KEY: to_dict(cache)}))
    return {**records, manifest.NAME: Record(path.stat().st_size, manifest.sha256_file(path))}


def _sidecar(part: Part, number: int) -> Path:
    return (part.folder / shard_file(number)).with_suffix(".json")


def _write(path: Path, data: Any) -> None:
    with replaced(path) as temporary:
        write_json(temporary, data)
