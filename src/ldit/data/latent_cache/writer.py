"""Writes a latent cache, as a job that processes share (`ldit.storage.shared_job`): a block is a shard.

CACHE/encode.json describes the job. After a shard has its final name, its sidecar shard-00000.json is written, a
manifest of that file alone; a shard without a sidecar is made again. When all sidecars are written, the cache's
manifest is written, and encode.json and the sidecars are removed.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ldit.config.serial import to_dict
from ldit.data.captions import FILE as CAPTIONS
from ldit.data.captions import Captions
from ldit.data.latent_cache.description import (
    HELDOUT,
    JOB,
    KEY,
    CacheDescription,
    ShardRecord,
    SourceRecord,
    is_bookkeeping,
    read_description,
    recorded,
    shard_file,
)
from ldit.data.latent_cache.job import EncodedShard, Part, job_of
from ldit.errors import DataError, SourceError
from ldit.log import logger
from ldit.storage import manifest
from ldit.storage.atomic import fsync, make_folder, write_json
from ldit.storage.locks import locked
from ldit.storage.manifest import Record
from ldit.storage.shards import ShardWriter
from ldit.storage.shared_job import SharedJob


@dataclass(frozen=True)
class Sidecar:
    """The content of a sidecar: size and checksum of its shard, rows, and (name, reason) of images left out."""

    record: Record
    rows: int
    skipped: tuple[tuple[str, str], ...]


class CacheJob(SharedJob[EncodedShard]):
    """The job to make the cache that `job` describes, in `out`; `heldout` describes the images of its held-out part."""

    ignored = ("codec.name",)  # a path on this machine; the fingerprint is compared instead

    def __init__(
        self, out: Path, job: CacheDescription, heldout: SourceRecord | None, captions: Captions | None = None
    ) -> None:
        self._captions = captions
        self.parts = [Part(out, job)]
        if heldout is not None:
            self.parts.append(Part(out / HELDOUT, replace(job, source=heldout, heldout=None)))
        # All shards of all parts, in the order in which processes take them.
        self._shards = [(index, number) for index, part in enumerate(self.parts) for number in range(len(part.ranges))]
        blocks = [self.parts[index].ranges[number] for index, number in self._shards]
        super().__init__(out, out, JOB, job_of(job), blocks)

    def shard(self, number: int) -> tuple[Part, int]:
        """The part of block `number`, and the number of its shard in that part."""
        index, shard = self._shards[number]
        return self.parts[index], shard

    def block_path(self, number: int) -> Path:
        part, shard = self.shard(number)
        return part.shard(shard)

    def bytes_needed(self, items: int) -> int:
        return self.parts[0].bytes(items)

    def is_complete(self) -> bool:
        if not (self.out / manifest.NAME).exists():
            return False
        self._check_same(job_of(read_description(self.out)[0]))
        return True

    def count_done(self) -> int:
        done = 0
        for part in self.parts:
            names = set(os.listdir(part.folder)) if part.folder.is_dir() else set()
            done += sum(len(rows) for i, rows in enumerate(part.ranges) if part.sidecar(i).name in names)
        return done

    def has_block(self, number: int) -> bool:
        """Read the shard and compare it with its sidecar. Of a damaged one the sidecar is removed, with a warning, so
        that it is made again."""
        if self.is_complete():
            return True
        part, shard = self.shard(number)
        sidecar, path = _read_sidecar(part, shard), part.shard(shard)
        if sidecar is None:
            return False
        try:
            if path.stat().st_size == sidecar.record.size and manifest.sha256_file(path) == sidecar.record.sha256:
                return True
        except FileNotFoundError:
            pass
        logger.warning("%s does not match its checksum and is made again", path)
        with locked(self.out):
            # Only if it is the sidecar that was compared: another process may have made the shard again meanwhile.
            if not self.is_complete() and _read_sidecar(part, shard) == sidecar:
                part.sidecar(shard).unlink(missing_ok=True)
        return False

    def _read_description(self) -> Any:
        if not self.description_file.exists():
            return None
        try:
            return manifest.read_body(self.out, JOB).get(KEY)
        except SourceError as error:
            raise SourceError(f"{error}; remove the folder and start again") from None

    def _write_description(self, path: Path) -> None:
        write_json(path, manifest.sealed({}, {KEY: self.description}))

    def _adopt(self, begun: Any) -> None:
        """Keep the codec's name of the job that was begun: the same codec may have been in another folder then."""
        self.description, name = begun, begun["codec"]["name"]
        self.parts = [replace(p, job=replace(p.job, codec=replace(p.job.codec, name=name))) for p in self.parts]

    def _write(self, number: int, block: EncodedShard) -> None:
        part, shard = self.shard(number)
        half = self._half(shard_file(shard))
        # Write the tensors to a file in the work folder; it is hashed while it is written, and fsynced at the end.
        entries = [("mean", block.mean), ("logvar", block.logvar), ("label", block.label)]
        with ShardWriter(half, [(name, t.dtype, tuple(t.shape)) for name, t in entries]) as writer:
            for _, tensor in entries:
                writer.add(tensor)
        self._publish(part, shard, half, Sidecar(writer.record, len(block.label), tuple(block.skipped)))

    def _publish(self, part: Part, shard: int, half: Path, sidecar: Sidecar) -> None:
        """Give a shard that is on the disk its final name, then write its sidecar. If another process was first, its
        shard stays: a reader may have it open already, and shards of other machines may differ in their last bits."""
        with locked(self.out):
            if self.is_complete() or _read_sidecar(part, shard) is not None:
                half.unlink(missing_ok=True)
                return
            make_folder(part.folder)
            part.sidecar(shard).unlink(missing_ok=True)  # a damaged one would be taken for that of the new shard
            self._rename(half, part.shard(shard))
            extra = {"rows": sidecar.rows, "skipped": to_dict(sidecar.skipped)}
            body = manifest.sealed({shard_file(shard): sidecar.record}, extra)
            self._put(part.sidecar(shard), lambda file: write_json(file, body))

    def _complete(self) -> bool:
        """Write the manifests if all shards are there; whether they are. DataError when no image of a part could be
        read."""
        # Compare the sizes of all shards with their sidecars. Reading them again could take hours.
        sidecars: list[list[Sidecar]] = []
        for part in self.parts:
            sidecars.append([])
            for shard in range(len(part.ranges)):
                sidecar, path = _read_sidecar(part, shard), part.shard(shard)
                if sidecar is None:
                    return False
                if not path.is_file() or path.stat().st_size != sidecar.record.size:
                    logger.warning("%s does not match its sidecar and is made again", path)
                    part.sidecar(shard).unlink()
                    return False
                sidecars[-1].append(sidecar)
        # Write the manifests, the held-out part's first: the training part's lists it and completes the cache.
        sealed: dict[str, Record] = {}
        for part, of_part in reversed(list(zip(self.parts, sidecars, strict=True))):
            place = part.folder.relative_to(self.out)
            if part is self.parts[0] and self._captions is not None:  # the held-out part shares them
                path = self.out / CAPTIONS
                self._put(path, self._captions.save)
                sealed[CAPTIONS] = Record(path.stat().st_size, manifest.sha256_file(path))
            sealed |= {(place / file).as_posix(): record for file, record in self._seal(part, of_part, sealed).items()}
        return True

    def _seal(self, part: Part, sidecars: Sequence[Sidecar], below: dict[str, Record]) -> dict[str, Record]:
        """Write a part's manifest, which also lists the files `below`; returns the records of the part's own files."""
        # The description of the finished part: where each shard begins, and which images were left out.
        shards = tuple(
            ShardRecord(shard_file(number), rows.start, rows.stop, sidecar.rows)
            for number, (rows, sidecar) in enumerate(zip(part.ranges, sidecars, strict=True))
        )
        cache = replace(part.job, skipped=tuple(pair for one in sidecars for pair in one.skipped), shards=shards)
        if not cache.rows:
            raise DataError(f"{part.folder}: none of its {cache.source.pictures} images could be encoded")
        # The checksums are those of the sidecars.
        records = {shard.file: sidecar.record for shard, sidecar in zip(shards, sidecars, strict=True)}
        path, body = part.folder / manifest.NAME, manifest.sealed({**records, **below}, {KEY: recorded(cache)})
        self._put(path, lambda file: write_json(file, body))
        return {**records, manifest.NAME: Record(path.stat().st_size, manifest.sha256_file(path))}

    def _sweep(self, has_locks: bool) -> None:
        """Remove files that are needed only while the cache is made, also those of older versions of the package.
        A process that still writes a shard notices that the cache is complete."""
        for part in reversed(self.parts):
            if part.folder.is_dir():
                # The description of the job goes last.
                files = sorted(filter(is_bookkeeping, os.listdir(part.folder)), key=lambda name: (name == JOB, name))
                for path in (part.folder / name for name in files):
                    if path.is_dir():
                        shutil.rmtree(path, ignore_errors=True)
                    else:
                        path.unlink(missing_ok=True)
                if files:
                    fsync(part.folder)


def _read_sidecar(part: Part, shard: int) -> Sidecar | None:
    """The sidecar of a shard; None if there is none or, with a warning, if it is damaged."""
    path = part.sidecar(shard)
    try:
        body = manifest.read_body(part.folder, path.name)
        record = Record(**body["files"][shard_file(shard)])
        return Sidecar(record, int(body["rows"]), tuple((where, reason) for where, reason in body["skipped"]))
    except (SourceError, KeyError, TypeError, ValueError) as error:
        if path.exists():
            logger.warning("%s is damaged (%s): its shard is made again", path, error)
        return None
