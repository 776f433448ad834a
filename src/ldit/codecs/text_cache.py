"""A cache of text features on disk: written as a job that processes share, read at any text.

A shard holds "keys" (n, 2) int64, the first 16 bytes of the sha256 of each text; "ends" (n,), where its features end;
and "features" (sum of tokens, F). TEXTS/texts.json describes the job. A finished shard has a sidecar, a manifest of
that file alone; when all have one, the cache's manifest is written, and texts.json and the sidecars are removed.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldit.config.serial import from_dict, to_dict
from ldit.errors import CodecError, ConfigError, RequestError, SourceError
from ldit.precision import DTYPES
from ldit.storage import manifest
from ldit.storage.atomic import read_json, write_json
from ldit.storage.manifest import Record
from ldit.storage.names import WORK
from ldit.storage.shards import ShardWriter
from ldit.storage.shared_job import SharedJob, cut
from ldit.storage.tensors import read_safetensors

VERSION = 1
KEY = "texts"  # of the manifest
JOB = "texts.json"
_KEY_BYTES = 16


@dataclass(frozen=True)
class TextCacheDescription:
    """Which texts, and the encoder that made their features."""

    version: int
    encoder: str
    """Fingerprint of the encoder and its tokenizer (`ldit.codecs.text.text_fingerprint`)."""
    name: str
    """The encoder's name; a path of another machine may stand here."""
    max_tokens: int
    precision: str
    """Dtype in which the encoder computed, and of the features."""
    width: int
    count: int
    """Number of texts."""
    sha256: str
    """Of all texts in order."""
    shard_size: int


class TextBlock(NamedTuple):
    """Features (T_i, F) of the texts of a block, in order."""

    features: list[Tensor]


def texts_digest(texts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(key_of(text))
    return digest.hexdigest()


def key_of(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:_KEY_BYTES]


def is_text_cache(root: Path) -> bool:
    """Whether a folder's manifest says that it is such a cache. Nothing is verified."""
    try:
        body = json.loads((root / manifest.NAME).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(body, dict) and KEY in body


class TextCacheJob(SharedJob[TextBlock]):
    """The job to write the features of `texts` into `out`."""

    ignored = ("name",)

    def __init__(self, out: Path, job: TextCacheDescription, texts: Sequence[str]) -> None:
        self.job, self.texts = job, texts
        super().__init__(out, out, JOB, to_dict(job), cut(len(texts), job.shard_size))

    def block_path(self, number: int) -> Path:
        return self.out / _shard(number)

    def bytes_needed(self, items: int) -> int:
        return items * (self.job.max_tokens * self.job.width * DTYPES[self.job.precision].itemsize + _KEY_BYTES + 8)

    def is_complete(self) -> bool:
        if not is_text_cache(self.out):
            return False
        self._check_same(to_dict(read_description(self.out)))
        return True

    def has_block(self, number: int) -> bool:
        """Whether a shard is there and equals its sidecar."""
        if self.is_complete():
            return True
        record, path = self._record(number), self.block_path(number)
        return record is not None and path.is_file() and manifest.sha256_file(path) == record.sha256

    def count_done(self) -> int:
        return sum(len(rows) for number, rows in enumerate(self.blocks) if self._sidecar(number).exists())

    def _read_description(self) -> Any:
        return read_json(self.description_file) if self.description_file.exists() else None

    def _write_description(self, path: Path) -> None:
        write_json(path, self.description)

    def _write(self, number: int, block: TextBlock) -> None:
        keys = b"".join(key_of(self.texts[i]) for i in self.blocks[number])
        tensors = {
            "keys": torch.frombuffer(bytearray(keys), dtype=torch.int64).view(-1, 2),
            "ends": torch.tensor([len(row) for row in block.features], dtype=torch.int64).cumsum(0),
            "features": torch.cat([row.cpu().to(DTYPES[self.job.precision]) for row in block.features]),
        }
        half = self._half(_shard(number))
        with ShardWriter(half, [(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]) as writer:
            for tensor in tensors.values():
                writer.add(tensor)
        # The shard first, then the sidecar that vouches for it.
        self._rename(half, self.block_path(number))
        body = manifest.sealed({_shard(number): writer.record})
        self._put(self._sidecar(number), lambda file: write_json(file, body))

    def _complete(self) -> bool:
        records = {}
        for number in range(len(self.blocks)):
            record, path = self._record(number), self.block_path(number)
            if record is None or not path.is_file() or path.stat().st_size != record.size:
                self._sidecar(number).unlink(missing_ok=True)
                return False
            records[_shard(number)] = record
        body = manifest.sealed(records, {KEY: to_dict(self.job)})
        self._put(self.out / manifest.NAME, lambda file: write_json(file, body))
        return True

    def _sweep(self, has_locks: bool) -> None:
        for number in range(len(self.blocks)):
            self._sidecar(number).unlink(missing_ok=True)
        self._remove_dead()
        self.description_file.unlink(missing_ok=True)

    def _sidecar(self, number: int) -> Path:
        return self.block_path(number).with_suffix(".json")

    def _record(self, number: int) -> Record | None:
        try:
            body = manifest.read_body(self.out, self._sidecar(number).name)
            return Record(*(body["files"][_shard(number)][key] for key in ("size", "sha256")))
        except (SourceError, KeyError, TypeError):
            return None


def check_text_cache_dir(out: Path) -> None:
    """RequestError when no cache can be written into `out`, which need not exist."""
    if out.exists() and not out.is_dir():
        raise RequestError(f"--out {out}: is a file, not a folder")
    if is_text_cache(out):
        return
    manifest.check_not_in_checkpoint(out)
    names = sorted(os.listdir(out)) if out.is_dir() else []
    for name in names:
        if JOB not in names or not (name == JOB or name.startswith((WORK, "shard-"))):
            raise RequestError(f"--out {out}: holds {name} and is no unfinished text cache; choose another folder")


def read_description(root: Path) -> TextCacheDescription:
    """CodecError when the manifest is damaged or not that of a text cache."""
    try:
        body = manifest.read_body(root)
        if not isinstance(body.get(KEY), dict):
            raise CodecError(f"{root} is not a cache of text features (ldit encode --text)")
        return from_dict(TextCacheDescription, body[KEY], KEY)
    except (SourceError, ConfigError) as error:
        raise CodecError(f"text cache {root}: {error}") from None


class TextCache:
    """The features of a cache's texts, from any thread. CodecError names what is missing or damaged."""

    def __init__(self, root: Path, verify: bool = True) -> None:
        if not root.is_dir():
            raise CodecError(f"text.cache: there is no folder {root}")
        if (root / JOB).exists() and not is_text_cache(root):
            raise CodecError(f"text cache {root} is not finished: run ldit encode --text again")
        self.root, self.job = root, read_description(root)
        names = [_shard(number) for number in range(len(cut(self.job.count, self.job.shard_size)))]
        try:
            if verify:
                manifest.verify(root, names)
            self._shards = [_Shard(root / name, self.job) for name in names]
        except SourceError as error:
            raise CodecError(f"text cache: {error}") from None
        keys = np.concatenate([shard.keys for shard in self._shards])
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]

    def place(self, text: str) -> int | None:
        """The number of a text in the cache; None where it is not."""
        key = np.frombuffer(key_of(text), f"V{_KEY_BYTES}")[0]
        at = int(np.searchsorted(self._keys, np.void(key)))
        return int(self._order[at]) if at < len(self._keys) and self._keys[at] == key else None

    def get(self, text: str) -> Tensor | None:
        """Features (T, F) in the cache's dtype; None for a text that is not in it."""
        place = self.place(text)
        if place is None:
            return None
        shard, row = divmod(place, self.job.shard_size)
        return self._shards[shard].row(row)


class _Shard:
    """A shard, memory-mapped."""

    def __init__(self, path: Path, job: TextCacheDescription) -> None:
        try:
            tensors = dict(read_safetensors(path))  # their pages are read when they are used
            keys, self._ends, self._features = tensors["keys"].numpy(), tensors["ends"].numpy(), tensors["features"]
        except (SourceError, KeyError) as error:
            raise CodecError(f"text cache: {path} is damaged: {error}") from None
        if keys.shape != (len(self._ends), 2) or self._features.shape != (self._ends[-1], job.width):
            raise CodecError(f"text cache: {path} is damaged: its parts do not fit together")
        self.keys = np.ascontiguousarray(keys).view(f"V{_KEY_BYTES}")[:, 0]

    def row(self, row: int) -> Tensor:
        return self._features[int(self._ends[row - 1]) if row else 0 : int(self._ends[row])].clone()


def _shard(number: int) -> str:
    return f"shard-{number:05d}.safetensors"
