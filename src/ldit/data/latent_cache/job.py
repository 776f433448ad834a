"""The job of `ldit encode`: what is made in which shards, and whether a folder may hold it."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldit.config.serial import to_dict
from ldit.data.latent_cache.description import (
    HELDOUT,
    RESULTS,
    CacheDescription,
    brief,
    is_bookkeeping,
    is_cache,
    is_shard,
)
from ldit.errors import RequestError, SourceError
from ldit.storage import manifest
from ldit.storage.names import RUN_CONFIG, is_run

JOB = "encode.json"
_HEADER = 512  # bytes, about


@dataclass(frozen=True)
class Part:
    """One of the caches in the making: the training images or the held-out ones."""

    folder: Path
    job: CacheDescription

    @property
    def ranges(self) -> list[range]:
        """The source samples of each shard."""
        total, size = self.job.source.pictures, self.job.shard_size
        return [range(first, min(first + size, total)) for first in range(0, total, size)]

    def bytes(self, rows: int) -> int:
        """Of a shard of so many rows, about."""
        values = 2 * torch.Size(self.job.shape).numel()
        return rows * (values * (2 if self.job.dtype == "bf16" else 4) + 8) + _HEADER


def check_cache_dir(out: Path, source: Path) -> None:
    """RequestError or SourceError when no cache can be made in `out`, which need not exist, of images in `source`."""
    if out.exists() and not out.is_dir():
        raise SourceError(f"{out} is a file, not a cache's folder")
    if (out / manifest.NAME).exists() and not is_cache(out):
        raise RequestError(
            f"--out {out}: is sealed by its {manifest.NAME}, which is not a cache's; choose another folder"
        )
    manifest.check_not_in_checkpoint(out.absolute().parent)
    for above in (out.absolute(), *out.absolute().parents):
        if is_run(above) and (above / RUN_CONFIG).exists():
            raise RequestError(f"--out {out}: lies inside the run {above}; choose another folder")
    if out.resolve().is_relative_to(source.resolve()):
        raise RequestError(f"--out {out}: lies inside {source}, whose images it is made of")
    names = sorted(os.listdir(out)) if out.is_dir() else []
    if is_cache(out):  # another process may have finished it meanwhile
        return
    for name in names:
        begun = JOB in names and (is_shard(name) or name == HELDOUT)
        if not begun and not is_bookkeeping(name):
            raise RequestError(f"--out {out}: holds {name} and is not a cache in the making; choose another folder")


def job_of(description: CacheDescription) -> dict[str, Any]:
    """A description without what is known at the end only."""
    return {key: value for key, value in to_dict(description).items() if key not in RESULTS}


def compare(out: Path, begun: CacheDescription | Any, job: CacheDescription) -> None:
    """RequestError when the cache in `out` was begun as another job; the codec's path may differ."""
    old = flattened(job_of(begun) if isinstance(begun, CacheDescription) else begun)
    new = flattened(job_of(job))
    for key in [*new, *sorted(old.keys() - new.keys())]:
        moved = key == "codec.name" and isinstance(old.get(key), str)
        if old.get(key) != new.get(key) and not moved:
            raise RequestError(
                f"--out {out}: made with {key} {brief(old.get(key))}, this command has {brief(new.get(key))}; "
                "choose another folder or give the same command"
            )


def flattened(data: Any, prefix: str = "") -> dict[str, Any]:
    """Nested objects as one, keys joined by dots."""
    if not isinstance(data, dict):
        return {prefix.removesuffix("."): data}
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= flattened(value, f"{prefix}{key}.")
    return flat
