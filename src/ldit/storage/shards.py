"""Sets of named tensors: STEM.safetensors, or shards with an index in the Hub's format.

A file is written tensor by tensor and hashed while it is written: it needs no second copy in memory and no second pass.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldit.errors import SourceError
from ldit.storage.atomic import write_json
from ldit.storage.manifest import Record
from ldit.storage.strange import damaged
from ldit.storage.tensors import read_safetensors

_WORDS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64", torch.int8: "I8"}
SUFFIX = ".safetensors"


def shard_name(stem: str, index: int, count: int) -> str:
    """The file name of shard `index` (from 0) of `count`."""
    return f"{stem}{SUFFIX}" if count == 1 else f"{stem}-{index + 1:05d}-of-{count:05d}{SUFFIX}"


def index_name(stem: str) -> str:
    return f"{stem}{SUFFIX}.index.json"


def write_index(folder: Path, stem: str, files: Mapping[str, str], total: int) -> None:
    """Write STEM.safetensors.index.json. `files`: tensor name -> file; `total`: bytes of all tensors."""
    names = {name: Path(file).name for name, file in files.items()}
    write_json(folder / index_name(stem), {"metadata": {"total_size": total}, "weight_map": names})


class ShardWriter:
    """Writes one safetensors file from tensors that come one by one, in the order of `entries` (name, dtype, shape).
    After `close`, `record` is its manifest entry."""

    def __init__(self, path: Path, entries: Sequence[tuple[str, torch.dtype, tuple[int, ...]]]) -> None:
        self.path, self.record = path, Record(0, "")
        self._waiting = list(entries)
        self._digest, self._size = hashlib.sha256(), 0
        # The header gives the offset of each tensor's bytes; it is padded to 8 bytes.
        header: dict[str, Any] = {}
        offset = 0
        for name, dtype, shape in entries:
            end = offset + torch.Size(shape).numel() * dtype.itemsize
            header[name] = {"dtype": _WORDS[dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file = path.open("wb")
        self._write(memoryview(len(text).to_bytes(8, "little") + text))

    def add(self, tensor: Tensor) -> None:
        """Write the next tensor, which is on the CPU."""
        name, dtype, shape = self._waiting.pop(0)
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} was announced as {dtype} {shape}")
        if tensor.numel():
            self._write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def _write(self, data: memoryview) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._size += data.nbytes

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(kind is None)

    def close(self, complete: bool = True) -> None:
        """Fsync the file, make its record and close it; only close it if it is not `complete`."""
        try:
            if not complete:
                return
            if self._waiting:
                raise ValueError(f"{self.path}: {self._waiting[0][0]} was announced and never came")
            self._file.flush()
            os.fsync(self._file.fileno())
            self.record = Record(self._size, self._digest.hexdigest())
        finally:
            self._file.close()


def has_set(folder: Path, stem: str) -> bool:
    """Whether there is any file of the set, even if others are missing: `set_files` reports those."""
    names = (f"{stem}{SUFFIX}", index_name(stem))
    return any((folder / name).is_file() for name in names) or any(folder.glob(f"{stem}-*-of-*{SUFFIX}"))


def set_files(folder: Path, stem: str) -> list[str]:
    """Names of the files of a set, relative to `folder`; SourceError when there is none, one is missing, or the index
    is damaged."""
    if (folder / f"{stem}{SUFFIX}").is_file():
        return [f"{stem}{SUFFIX}"]
    return sorted(set(_weight_map(folder, stem).values()))


def _weight_map(folder: Path, stem: str) -> dict[str, str]:
    """Tensor name -> file, relative to `folder`, from the index."""
    path = folder / index_name(stem)
    if not path.is_file():
        raise SourceError(f"{folder} has neither {stem}{SUFFIX} nor {path.name}")
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(damaged(path, error)) from None
    files = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(files, dict) or not files or not all(isinstance(f, str) for f in files.values()):
        raise SourceError(f"{path} is damaged: no weight_map")
    # An index may come from anywhere: its files must be beside it.
    parent = Path(stem).parent
    for name in sorted(set(files.values())):
        if Path(name).name != name or "\\" in name or not name.endswith(SUFFIX):
            raise SourceError(f"{path}: {name!r} is not the name of a weight file beside it")
        if not _is_file(folder / parent / name):
            raise SourceError(f"{folder / parent / name} is missing")
    return {name: (parent / file).as_posix() for name, file in files.items()}


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # the name is too long for the file system
        return False


def read_set(folder: Path, stem: str) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a set, memory-mapped, one by one."""
    for name in set_files(folder, stem):
        yield from read_safetensors(folder / name)


class PartReader:
    """Reads parts of the tensors of a set, so that a rank reads no more than its own parts."""

    def __init__(self, folder: Path, stem: str) -> None:
        self.folder, self.stem = folder, stem
        self._open: dict[str, Any] = {}
        files = set_files(folder, stem)
        try:
            for file in files:
                self._open[file] = safe_open(folder / file, framework="pt")
            pairs = [(name, file) for file in files for name in self._open[file].keys()]  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise SourceError(damaged(folder / file, error)) from None
        self._where = dict(pairs)
        if len(self._where) < len(pairs):
            raise SourceError(f"{folder}: a tensor of {stem} is in two files")

    def names(self) -> set[str]:
        return set(self._where)

    def read(self, name: str, shape: tuple[int, ...], part: tuple[slice, ...]) -> Tensor:
        """A part of tensor `name`, whose full shape must be `shape`; SourceError otherwise."""
        if name not in self._where:
            raise SourceError(f"{self.folder}: {self.stem} has no {name}")
        file = self._where[name]
        try:
            entry = self._open[file].get_slice(name)
            stored = tuple(entry.get_shape())
            if stored != shape:
                raise SourceError(f"{self.folder / file}: {name} has shape {stored}, the run needs {shape}")
            if not part:
                return self._open[file].get_tensor(name)
            if any(s.start == s.stop for s in part):
                return self._open[file].get_tensor(name)[part]
            return entry[part]
        except (SafetensorError, OSError, ValueError) as error:
            raise SourceError(damaged(self.folder / file, error)) from None
