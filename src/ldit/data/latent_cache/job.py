"""The job of `ldit encode`: its parts and shards, and whether a folder may be used for it."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldit.data.captions import FILE as CAPTIONS
from ldit.data.latent_cache.description import (
    HELDOUT,
    JOB,
    RESULTS,
    CacheDescription,
    is_bookkeeping,
    is_cache,
    is_shard,
    recorded,
    shard_file,
)
from ldit.errors import RequestError, SourceError
from ldit.storage import manifest
from ldit.storage.names import RUN_CONFIG, is_run
from ldit.storage.outputs import refuse_inside
from ldit.storage.shared_job import cut

_HEADER = 512  # bytes of a shard's header, approximately


@dataclass(frozen=True)
class Part:
    """One of the caches of a job: that of the training images, or that of the held-out ones."""

    folder: Path
    job: CacheDescription

    @property
    def ranges(self) -> list[range]:
        """The source images of each shard."""
        return cut(self.job.source.pictures, self.job.shard_size)

    def shard(self, number: int) -> Path:
        return self.folder / shard_file(number)

    def sidecar(self, number: int) -> Path:
        """The file of a shard's own manifest, written when the shard has its final name."""
        return self.shard(number).with_suffix(".json")

    def bytes(self, rows: int) -> int:
        """Approximate size in bytes of a shard of so many rows."""
        values = 2 * torch.Size(self.job.shape).numel()
        return rows * (values * (2 if self.job.dtype == "bf16" else 4) + 8) + _HEADER


class EncodedShard(NamedTuple):
    """`mean` and `logvar` (N, 2, C, h, w) in the cache's dtype, `label` (N,) int64, and (name, reason) of each image of
    the range that was left out."""

    mean: Tensor
    logvar: Tensor
    label: Tensor
    skipped: list[tuple[str, str]]


def check_cache_dir(out: Path, source: Path) -> None:
    """RequestError or SourceError when no cache of the images in `source` can be made in `out`, which need not
    exist."""
    if out.exists() and not out.is_dir():
        raise SourceError(f"{out} is a file, not a cache's folder")
    # Not where a file more would damage something: in a checkpoint, a run, or among the images that are encoded.
    if (out / manifest.NAME).exists() and not is_cache(out):
        raise RequestError(f"--out {out}: is sealed by its {manifest.NAME}, not that of a cache; choose another folder")
    manifest.check_not_in_checkpoint(out.absolute().parent)
    for above in (out.absolute(), *out.absolute().parents):
        if is_run(above) and (above / RUN_CONFIG).exists():
            raise RequestError(f"--out {out}: is inside the run {above}; choose another folder")
    refuse_inside(out, [source])
    # Not among files of other kinds. Names are listed first: another process may complete the cache at this moment.
    names = sorted(os.listdir(out)) if out.is_dir() else []
    if is_cache(out):  # another process may have finished it meanwhile
        return
    for name in names:
        begun = JOB in names and (is_shard(name) or name in (HELDOUT, CAPTIONS))
        if not begun and not is_bookkeeping(name):
            raise RequestError(f"--out {out}: holds {name} and is not an unfinished cache; choose another folder")


def job_of(description: CacheDescription) -> dict[str, Any]:
    """A description without what is known only when the cache is complete."""
    return {key: value for key, value in recorded(description).items() if key not in RESULTS}
