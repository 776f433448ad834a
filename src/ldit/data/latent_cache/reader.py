"""Reads a latent cache: any sample at any time, from any thread."""

import json
import math
import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from ldit.config.serial import show
from ldit.data.captions import FILE as CAPTIONS
from ldit.data.captions import Captions, read_captions
from ldit.data.images.limits import no_file
from ldit.data.latent_cache.description import HELDOUT, CacheDescription, is_bookkeeping, read_description
from ldit.errors import DataError, LditError, RunError, SourceError
from ldit.storage import manifest

MOST_OPEN = 128  # file descriptors of one cache
_DTYPES: dict[str, tuple[str, np.dtype[Any]]] = {
    "bf16": ("BF16", np.dtype("<u2")),  # numpy has no bf16: its bits
    "fp32": ("F32", np.dtype("<f4")),
}
_HEADER_LIMIT = 1 << 16


class LatentSamples:
    """The samples of a cache: float32 (2C, h, w), the means, then the log-variances, unscaled. Random access from any
    thread: a sample is two reads at known offsets. At most MOST_OPEN files are open."""

    def __init__(
        self, root: Path, description: CacheDescription, sha256: str, captions: Captions | None = None
    ) -> None:
        """`captions`: those of the images, whose labels are then rows of them."""
        self.root, self.cache, self._captions = root, description, captions
        self.names = description.names or ()
        self.num_before_cap = description.rows  # the cap was applied when the cache was made
        _, channels, height, width = description.shape
        self.shape = (2 * channels, height, width)
        self._sha256 = sha256
        self._kind = _DTYPES[description.dtype][1]
        self._half = channels * height * width * self._kind.itemsize  # bytes of the means of one image
        # Check the header of each shard, and read all labels.
        self._ends = list(accumulate(shard.rows for shard in description.shards))
        self._paths = [str(root / shard.file) for shard in description.shards]
        self._places, labels = [], [np.empty(0, np.int64)]
        for path, shard in zip(self._paths, description.shards, strict=True):
            self._places.append(_offsets(path, description, shard.rows))
            count = max(len(self.names), 1) if captions is None else len(captions)
            labels.append(_labels(path, self._places[-1][2], shard.rows, count))
        self._labels = np.concatenate(labels).astype(np.int32)
        self._files = _OpenFiles(MOST_OPEN)

    def __len__(self) -> int:
        return self.num_before_cap

    def read(self, index: int, flip: bool, out: np.ndarray) -> int:
        """Fill `out` with sample `index`, with `flip` that of the mirrored image; returns its class. bf16 is converted
        exactly. RunError names a file that is gone, unreadable, or has become shorter since the cache was opened."""
        # A row holds the values of the image, then those of its mirror image.
        shard, row = self._place(index)
        path = self._paths[shard]
        offset = (2 * row + bool(flip)) * self._half
        channels = self.shape[0] // 2
        try:
            file = self._files.get(path)
            for part, begin in enumerate(self._places[shard][:2]):
                data = os.pread(file.descriptor, self._half, begin + offset)
                if len(data) < self._half:
                    raise RunError(f"{path} has become shorter: it ends before sample {row}")
                _widen(np.frombuffer(data, self._kind), out[part * channels : (part + 1) * channels])
        except OSError as error:
            raise RunError(f"cannot read {path}: {error.strerror or error}") from None
        return int(self._labels[index])

    def where(self, index: int) -> str:
        """File and row."""
        shard, row = self._place(index)
        return f"{self.cache.shards[shard].file}[{row}]"

    def fingerprint(self) -> str:
        """The manifest's own checksum, which covers those of all files."""
        return self._sha256

    def captions(self) -> Captions:
        if self._captions is None:
            raise DataError(f"{self.root} was made without captions; encode its images again with --captions")
        return self._captions

    def caption_row(self, index: int) -> int:
        return int(self._labels[index])

    def _place(self, index: int) -> tuple[int, int]:
        if not 0 <= index < self.num_before_cap:
            raise IndexError(f"sample {index} of {self.num_before_cap}")
        shard = bisect_right(self._ends, index)
        return shard, index - (self._ends[shard - 1] if shard else 0)


def open_latents(
    root: Path, verify: bool = True, share: tuple[int, int] = (0, 1), captions: Captions | None = None
) -> LatentSamples:
    """The cache in `root`. DataError names what is missing, extra, damaged, or does not fit the description.

    Always checked: the manifest's own checksum, the names in the folder, each shard's header and labels. With `verify`
    the checksums of the shards too: with `share` (i, n) those of the i-th of n shares, about equal in bytes.
    """
    # The folder must hold what the manifest lists, and nothing else but files of an unfinished encode.
    description, body = read_description(root)
    names = [shard.file for shard in description.shards]
    listed = {name.split("/")[0] for name in body["files"]} | {manifest.NAME}
    for extra in sorted(set(os.listdir(root)) - listed):
        if not is_bookkeeping(extra):
            raise DataError(f"{root / extra} is not in the manifest")
    # Checksums: the held-out part has a manifest of its own.
    try:
        if description.heldout is not None:
            manifest.verify(root, [f"{HELDOUT}/{manifest.NAME}"])
        if verify:
            manifest.verify(root, names, share)
        # The held-out part shares the captions of the training part.
        if description.captions and captions is None:
            manifest.verify(root, [CAPTIONS])
            captions = read_captions(root / CAPTIONS)
    except SourceError as error:
        raise DataError(str(error)) from None
    return LatentSamples(root, description, body["sha256"], captions if description.captions else None)


def open_cache(
    root: Path, verify: bool = True, share: tuple[int, int] = (0, 1)
) -> tuple[LatentSamples, LatentSamples | None]:
    """(training, held-out or None) of a cache; see `open_latents`."""
    train = open_latents(root, verify, share)
    if train.cache.heldout is None:
        return train, None
    return train, open_latents(root / HELDOUT, verify, share, train.captions() if train.cache.captions else None)


class _OpenFile:
    """A file descriptor, closed with its last reference: another thread may still read when it is dropped."""

    def __init__(self, path: str) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


class _OpenFiles:
    """Open files: the `most` that were read last."""

    def __init__(self, most: int) -> None:
        self._most, self._lock = most, threading.Lock()
        self._open: OrderedDict[str, _OpenFile] = OrderedDict()

    def get(self, path: str) -> _OpenFile:
        with self._lock:
            file = self._open.get(path)
            if file is None:
                file = self._open[path] = _OpenFile(path)
                if len(self._open) > self._most:
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(path)
            return file


def _widen(values: np.ndarray, out: np.ndarray) -> None:
    """Write stored values into fp32 `out`. The bits of a bf16 are the upper half of an fp32."""
    if values.dtype.itemsize == 2:
        wide = values.astype(np.uint32)
        wide <<= 16
        values = wide.view(np.float32)
    out[...] = values.reshape(out.shape)


def _offsets(path: str, description: CacheDescription, rows: int) -> tuple[int, int, int]:
    """Offsets of mean, logvar and label in a shard; DataError when its header is not that of `rows` samples."""
    # Read the safetensors header.
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length <= _HEADER_LIMIT else None
    except OSError as error:
        raise _unopened(path, error) from None
    except (ValueError, RecursionError):
        header = None
    # The entries that it must have.
    word, kind = _DTYPES[description.dtype]
    shape = [rows, *description.shape]
    layout = {"mean": (word, shape, kind.itemsize), "logvar": (word, shape, kind.itemsize), "label": ("I64", [rows], 8)}
    if not isinstance(header, dict) or header.keys() - {"__metadata__"} != layout.keys():
        raise DataError(f"{path} is damaged: its header is not that of a shard")
    # Their dtypes, shapes and offsets.
    begins = []
    for name, (dtype, dimensions, item) in layout.items():
        entry = header[name] if isinstance(header[name], dict) else {}
        if entry.get("dtype") != dtype or entry.get("shape") != dimensions:
            stored = f"{show(entry.get('dtype'))} {show(entry.get('shape'))}"
            raise DataError(f"{path}: {name} is {stored}, the manifest says {dtype!r} {dimensions}")
        begin, end = _span(entry.get("data_offsets"))
        if end - begin != math.prod(dimensions) * item or begin < 0 or 8 + length + end > size:
            raise DataError(f"{path} is damaged: {name} is not within its {size} bytes")
        begins.append(8 + length + begin)
    return begins[0], begins[1], begins[2]


def _unopened(path: str, error: OSError) -> LditError:
    return (DataError if no_file(error) else RunError)(f"cannot read {path}: {error.strerror or error}")


def _span(value: Any) -> tuple[int, int]:
    """data_offsets of a header entry; (0, -1), an impossible span, if it has none."""
    if isinstance(value, list) and len(value) == 2 and all(type(v) is int for v in value):
        return value[0], value[1]
    return 0, -1


def _labels(path: str, begin: int, rows: int, classes: int) -> np.ndarray:
    try:
        labels = np.fromfile(path, "<i8", rows, offset=begin)
    except OSError as error:
        raise _unopened(path, error) from None
    if len(labels) < rows or (rows and not 0 <= labels.min() <= labels.max() < classes):
        raise DataError(f"{path} is damaged: its labels are not {rows} of {classes} classes")
    return labels
