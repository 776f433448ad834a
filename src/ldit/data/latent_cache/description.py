"""The description of a latent cache: manifest.json lists its files and holds the key "cache".

A shard holds "mean" and "logvar", both (N, 2, C, h, w) with axis 1 = plain, flipped, and "label" (N): the moments of
an autoencoder's posterior for every image of a set and its mirror image. CACHE/heldout/ is a cache of its own.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ldit.config.sections import DataConfig
from ldit.config.serial import from_dict, show, to_dict
from ldit.errors import ConfigError, DataError, SourceError, brief
from ldit.storage import manifest
from ldit.storage.names import WORK

VERSION = 1
KEY = "cache"  # of the manifest
HELDOUT = "heldout"
JOB = "encode.json"  # the description of an unfinished cache
CROP = "adm-center"
FLIPS = ("plain", "flipped")
_SHARD = re.compile(r"shard-\d{5,}\.safetensors")
_BOOKKEEPING = re.compile(
    r"((encode|shard-\d{5,})\.json|tar-index-[0-9a-f]{12}\.npz)(\.tmp-.+)?|(shard-\d{5,}\.safetensors|manifest\.json)\.tmp-.+"
)
_MOST_VALUES = 1 << 28  # of one sample
RESULTS = ("skipped", "shards")
"""The fields of a description that are known only when the cache is complete; the others describe the job."""


def shard_file(index: int) -> str:
    return f"shard-{index:05d}.safetensors"


def is_shard(name: str) -> bool:
    return _SHARD.fullmatch(name) is not None


def is_bookkeeping(name: str) -> bool:
    """Whether `ldit encode` needs a file or folder of this name to continue, and removes it when the cache is
    complete."""
    return name.startswith(WORK) or _BOOKKEEPING.fullmatch(name) is not None


@dataclass(frozen=True)
class CodecRecord:
    """The autoencoder. Moments are stored unscaled: scale and shift are applied when they are read."""

    fingerprint: str
    name: str
    factor: int
    channels: int
    scale: float | tuple[float, ...]
    shift: float | tuple[float, ...]


@dataclass(frozen=True)
class ImagesRecord:
    """A set of images: how many, and its fingerprint."""

    pictures: int
    sha256: str


@dataclass(frozen=True)
class SourceRecord(ImagesRecord):
    """The images of this cache, how they were decoded (fields of `ldit.data.images.decoding.Decoding`), and the cap
    on classes."""

    decoding: dict[str, Any]
    max_per_class: int = 0


@dataclass(frozen=True)
class ShardRecord:
    """Images first … last-1 of the source, of which `rows` could be read."""

    file: str
    first: int
    last: int
    rows: int


@dataclass(frozen=True)
class CacheDescription:
    """The content of a cache, and how it was made."""

    version: int
    codec: CodecRecord
    crop: str
    size: int
    """Side of the images in pixels."""
    flips: tuple[str, ...]
    dtype: Literal["bf16", "fp32"]
    precision: Literal["fp32", "bf16", "fp16"]
    """Dtype in which the codec computed."""
    shape: tuple[int, int, int, int]
    """(2, C, h, w): the means of a sample and of its mirror image; the log-variances have the same shape."""
    names: tuple[str, ...] | None
    """Class names by index."""
    source: SourceRecord
    heldout: ImagesRecord | None
    """The held-out images, whose cache is in the folder heldout/."""
    shard_size: int
    captions: str = ""
    """sha256 of the captions of all images, which lie beside the shards and in which labels are rows; "" = there are
    none, and labels are classes."""
    skipped: tuple[tuple[str, str], ...] = ()
    """(name, reason) of images that were left out, in the order of the source."""
    shards: tuple[ShardRecord, ...] = ()

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    def check(
        self, where: object, codec_fingerprint: str | None = None, size: int | None = None, crop: str | None = None
    ) -> None:
        """DataError with both values when the cache was made by another codec, or from images of another size or crop.
        None is not compared. `where` names the cache."""
        for what, made, needed in (
            ("the codec of fingerprint", self.codec.fingerprint, codec_fingerprint),
            ("images of size", self.size, size),
            ("crop", self.crop, crop),
        ):
            if needed is not None and made != needed:
                raise DataError(f"{where} was made with {what} {brief(made)}, {brief(needed)} is needed")

    def check_run(self, where: object, config: DataConfig) -> None:
        """DataError with both values when a run's settings differ from those with which the images were encoded.
        `where` names the cache."""
        made = {**self.source.decoding, "max_per_class": self.source.max_per_class, "codec_precision": self.precision}
        for key, cached in made.items():
            configured = to_dict(getattr(config, key, cached))
            if cached != configured:
                words = " ".join(map(str, cached)) if isinstance(cached, list) else str(cached)
                raise DataError(
                    f"data.{key}: {show(configured)}, but {where} was made with {show(cached)} "
                    f"(--data.{key.replace('_', '-')} {words})"
                )


def recorded(cache: CacheDescription) -> dict[str, Any]:
    """The description as JSON; without captions as it was before there were any."""
    return {key: value for key, value in to_dict(cache).items() if value or key != "captions"}


def is_cache(root: Path) -> bool:
    """Whether a folder's manifest says that it is a cache. Nothing is verified."""
    try:
        data = json.loads((root / manifest.NAME).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(data, dict) and KEY in data


def read_description(root: Path) -> tuple[CacheDescription, dict[str, Any]]:
    """(description, manifest) of a cache. The manifest's own checksum is verified; DataError says what is wrong."""
    # Read the manifest, then the description in it.
    where = root / manifest.NAME
    try:
        body = manifest.read_body(root)
    except SourceError as error:
        raise DataError(str(error)) from None
    data = body.get(KEY)
    version = data.get("version") if isinstance(data, dict) else None
    if not isinstance(version, int):
        raise DataError(f"{where} is not that of a latent cache")
    if version > VERSION:
        raise DataError(f"{where}: cache version {version} is newer than {VERSION}; update ldit")
    try:
        description = from_dict(CacheDescription, data, KEY)
    except ConfigError as error:
        raise DataError(f"{where}: {error}") from None
    # Its parts must agree with each other and with the list of files.
    problem = _problem(description, body["files"])
    if problem:
        raise DataError(f"{where}: {KEY}.{problem}")
    return description, body


def _problem(cache: CacheDescription, files: dict[str, Any]) -> str | None:
    """The first contradiction in a description; None where there is none. `files` are those of the manifest."""
    # Shapes must be those of the codec and the images.
    two, channels, *sides = cache.shape
    if (
        two != 2
        or channels != cache.codec.channels
        or min(channels, *sides) < 1
        or math.prod(cache.shape) > _MOST_VALUES
    ):
        return f"shape: {show(cache.shape)} is not (2, {cache.codec.channels}, h, w)"
    if cache.flips != FLIPS:
        return f"flips: expected {show(FLIPS)}, got {show(cache.flips)}"
    if any(side * cache.codec.factor != cache.size for side in sides):
        return f"shape: {show(cache.shape)} is not that of images of {show(cache.size)} pixels"
    # The shards must cover all images in order, without gaps.
    place = 0
    for number, shard in enumerate(cache.shards):
        if shard.file != shard_file(number) or shard.file not in files:
            return f"shards[{number}].file: {shard.file!r:.80} is not {shard_file(number)}, or not in the manifest"
        if shard.first != place or not 0 <= shard.rows <= shard.last - shard.first:
            return f"shards[{number}]: {shard.rows} rows of {shard.first} to {shard.last} after {place}"
        place = shard.last
    if place != cache.source.pictures or cache.rows + len(cache.skipped) != place:
        return f"shards: {cache.rows} rows and {len(cache.skipped)} skipped of {cache.source.pictures} images"
    return None
