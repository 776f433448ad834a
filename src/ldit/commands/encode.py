"""Images through an autoencoder into a latent cache: resumable, and on any number of processes that need not meet.

Each process takes shards rank, rank + world, …; they say nothing to each other but by the files
(`ldit.data.latent_cache.writer`). A shard's bytes depend on the images of its range alone: batches never cross
shards and
always hold the same images.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ldit.codecs.autoencoder import AutoencoderCodec
from ldit.codecs.kl_config import read_kl_config
from ldit.codecs.open import codec_folder, open_codec
from ldit.config.sections import DataConfig
from ldit.config.serial import to_dict
from ldit.config.spec import AutoencoderConfig
from ldit.data.images.decoding import Decoding
from ldit.data.latent_cache.description import (
    CROP,
    FLIPS,
    VERSION,
    CacheDescription,
    CodecRecord,
    ImagesRecord,
    SourceRecord,
)
from ldit.data.latent_cache.encoder import Codec, Encoder
from ldit.data.latent_cache.job import check_cache_dir
from ldit.data.latent_cache.reader import open_cache
from ldit.data.latent_cache.writer import Making
from ldit.data.samples import Samples
from ldit.data.source import keep_index, open_data
from ldit.errors import ConfigError, DataError, RunError
from ldit.log import logger
from ldit.parallel.world import launched
from ldit.pipeline.load import process_device
from ldit.precision import DTYPES
from ldit.storage.progress import Progress
from ldit.storage.signals import stopped_by_signals


@dataclass(frozen=True)
class EncodeJob:
    """What `ldit encode` is asked for."""

    path: str
    out: Path
    image_size: int = 256
    codec: str = "stabilityai/sd-vae-ft-ema"
    codec_root: Path | None = None
    dtype: Literal["bf16", "fp32"] = "bf16"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    batch_size: int = 32
    shard_size: int = 4096
    workers: int = 2
    timeout: float = DataConfig.timeout
    heldout: str | None = None
    max_per_class: int = 0
    bad: Literal["stop", "skip"] = "stop"
    exif: bool = False
    background: tuple[int, int, int] = (255, 255, 255)
    max_pixels: int = 1 << 26
    device: str | None = None

    def __post_init__(self) -> None:
        least = {"image_size": 1, "batch_size": 1, "shard_size": 1, "workers": 0, "max_per_class": 0, "max_pixels": 1}
        for key, value in least.items():
            if getattr(self, key) < value:
                raise ConfigError(f"--{key.replace('_', '-')}: must be at least {value}, got {getattr(self, key)}")
        if not self.timeout > 0:
            raise ConfigError(f"--timeout: must be more than 0, got {self.timeout}")
        if not all(0 <= value <= 255 for value in self.background):
            raise ConfigError(f"--background: three numbers from 0 to 255, got {self.background}")

    @property
    def decoding(self) -> Decoding:
        return Decoding(self.exif, self.background, self.max_pixels)


def encode(job: EncodeJob) -> bool:
    """Make this process's shards of the cache; True when it is whole afterwards, False when others are at work still.

    Stopped after a signal (`ldit.storage.signals`), a second one exits at once. DataError names an image that cannot be
    read or whose latents are not finite, unless such are skipped; RequestError an --out that is something else's or
    another job's.
    """
    with stopped_by_signals():
        launch = launched()
        source, heldout = open_data(
            job.path, job.image_size, job.heldout, job.max_per_class, job.decoding, index_dir=job.out
        )
        check_cache_dir(job.out, source.root)
        if source.shape != (3, job.image_size, job.image_size):
            raise DataError(f"{source.root} does not hold images: nothing to encode")
        device = process_device(job.device)
        codec = open_autoencoder(job, device)
        kept = None if heldout is None else _record(job, heldout, training=False)
        making = Making(job.out, _describe(job, codec, source, heldout), kept)
        if not making.begin():
            logger.info("%s is whole: nothing is left to do", job.out)
            return True
        if launch.rank == 0:
            keep_index(source, job.out)
        sets = [source] if heldout is None else [source, heldout]
        total = sum(part.job.source.pictures for part in making.parts)
        progress = Progress(total, making.images_done, launch.rank == 0, "images")
        skip = job.bad == "skip"
        encoder = Encoder(codec, device, job.batch_size, job.workers, skip, job.timeout, progress.begun)
        try:
            for part, number in making.shards()[launch.rank :: launch.size]:
                if making.whole():
                    break
                if not making.stands(part, number):
                    samples = sets[making.parts.index(part)]
                    making.write(part, number, *encoder.shard(samples, part, part.ranges[number]))
                    progress.advance(len(part.ranges[number]))
        finally:
            encoder.close()
            progress.close()
        whole = making.finish()
        if whole and launch.rank == 0:
            _say(job.out)
        if not whole:
            if launch.size == 1:
                raise RunError(f"{job.out}: a shard was lost while others were made; the same command makes it again")
            done = making.images_done()
            logger.info("process %d of %d is done; %d of %d images are encoded", launch.rank, launch.size, done, total)
        return whole


def open_autoencoder(job: EncodeJob, device: torch.device) -> Codec:
    """The codec of a job, with its own scale and shift, which are recorded; latents are kept raw."""
    roots = () if job.codec_root is None else (job.codec_root,)
    own = read_kl_config(codec_folder(job.codec, roots))
    scale, shift = own.scaling
    config = AutoencoderConfig(name=job.codec, scale=scale, shift=shift, factor=own.factor)
    codec = open_codec(config, roots, device, DTYPES[job.precision])
    assert isinstance(codec, AutoencoderCodec)
    return codec


def _describe(job: EncodeJob, codec: Codec, source: Samples, heldout: Samples | None) -> CacheDescription:
    config, size = codec.config, job.image_size
    if size % codec.factor:
        raise ConfigError(f"--image-size: {size} is not a multiple of the codec's factor {codec.factor}")
    side = size // codec.factor
    return CacheDescription(
        version=VERSION,
        codec=CodecRecord(codec.fingerprint(), config.name, codec.factor, codec.channels, config.scale, config.shift),
        crop=CROP,
        size=size,
        flips=FLIPS,
        dtype=job.dtype,
        precision=job.precision,
        shape=(2, codec.channels, side, side),
        names=tuple(source.names) or None,
        source=_record(job, source, training=True),
        heldout=None if heldout is None else ImagesRecord(len(heldout), heldout.fingerprint()),
        shard_size=job.shard_size,
    )


def _record(job: EncodeJob, samples: Samples, training: bool) -> SourceRecord:
    cap = job.max_per_class if training else 0
    return SourceRecord(len(samples), samples.fingerprint(), to_dict(job.decoding), cap)


def _say(out: Path) -> None:
    for cache in filter(None, open_cache(out, verify=False)):
        logger.info(
            "%s: %s images and their mirror images, %d left out",
            cache.root, f"{len(cache):,}", len(cache.cache.skipped),
        )  # fmt: skip
