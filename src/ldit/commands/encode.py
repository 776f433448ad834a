"""`ldit encode`: encodes images into a latent cache, resumable, on any number of processes.

Processes communicate through files only (`ldit.storage.shared_job`). A shard's bytes depend on the images of its range
alone: batches never cross shards and always contain the same images.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, TypedDict, Unpack

import torch

from ldit.codecs import codec as codecs
from ldit.codecs.kl_config import read_kl_config
from ldit.codecs.open import SAMPLING_HELP, codec_folder
from ldit.commands.encode_text import make_text_cache
from ldit.commands.finetune import experiment_of
from ldit.config.requests.encode import EncodeRequest
from ldit.config.requests.fields import from_keywords
from ldit.config.sections import TextConfig
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
from ldit.data.latent_cache.encoder import Encoder
from ldit.data.latent_cache.job import check_cache_dir
from ldit.data.latent_cache.reader import open_cache
from ldit.data.latent_cache.writer import CacheJob
from ldit.data.samples import Captioned, Samples
from ldit.data.source import keep_index, open_data
from ldit.errors import ConfigError, DataError
from ldit.log import logger, setup
from ldit.parallel.world import launched
from ldit.pipeline.load import process_device
from ldit.precision import DTYPES
from ldit.storage.progress import Progress
from ldit.storage.signals import Stopped, stopped_by_signals


class EncodeKeywords(TypedDict, total=False):
    """The fields of `ldit.config.requests.encode.EncodeRequest`, which documents them, and their aliases."""

    recipe: str
    image_size: int
    heldout: str | None
    max_per_class: int
    codec: str
    local_diffusers_model_root: Path | None
    codec_root: Path | None
    dtype: Literal["bf16", "fp32"]
    precision: Literal["fp32", "bf16", "fp16"]
    bad: Literal["stop", "skip"]
    exif: bool
    background: tuple[int, int, int]
    max_pixels: int
    batch_size: int
    shard_size: int
    workers: int
    timeout: float
    device: str | None
    captions: bool
    text: bool
    encoder: str
    tokenizer: str
    max_tokens: int


def encode(path: str | Path, out: str | Path, **keywords: Unpack[EncodeKeywords]) -> Path:
    """`ldit.encode`: encode images into a latent cache, which can replace the images in training. Returns the cache's
    folder. After an interruption, the same call finishes the cache. Errors as in `make_cache`."""
    make_cache(from_keywords(EncodeRequest, {**keywords, "path": str(path), "out": Path(out)}, "encode"))
    return Path(out)


def run(request: EncodeRequest) -> int:
    """`ldit encode`."""
    setup()
    try:
        is_complete = make_cache(request)
    except Stopped as stop:
        print(f"ldit: {stop}: {request.out} is kept, rerun the same command to finish it", file=sys.stderr)
        return stop.code
    if is_complete:
        print(request.out)
    return 0


def make_cache(request: EncodeRequest) -> bool:
    """Make this process's shards of the cache. Returns whether it is complete afterwards; False when other processes
    are still working.

    Stopped after a signal (`ldit.storage.signals`); a second signal exits at once. DataError names an image that cannot
    be read or whose latents are not finite, unless bad images are skipped. RequestError when --out holds something else
    or another job.
    """
    if request.recipe:
        request = request.with_recipe(experiment_of(request.recipe).config)
    with stopped_by_signals():
        if request.text and request.captions:
            raise ConfigError("--text caches features of texts and no latents; leave out --captions")
        if request.text:
            return make_text_cache(request)
        if (request.encoder, request.tokenizer) != (TextConfig.encoder, ""):
            raise ConfigError("--encoder and --tokenizer go with --text")
        launch = launched()
        # Open and check everything before anything is written.
        source: Samples
        heldout: Samples | None
        source, heldout = open_data(
            request.path, request.image_size, request.heldout, request.max_per_class, _decoding(request), request.out
        )
        if request.captions:
            source, heldout = Captioned(source), None if heldout is None else Captioned(heldout)
        check_cache_dir(request.out, source.root)
        if source.shape != (3, request.image_size, request.image_size):
            raise DataError(f"{source.root} does not hold images: nothing to encode")
        device = process_device(request.device)
        codec = open_autoencoder(request, device)
        heldout_record = None if heldout is None else _record(request, heldout, training=False)
        captions = source.captions() if request.captions else None
        cache = CacheJob(request.out, _describe(request, codec, source, heldout), heldout_record, captions)
        # Begin the cache, or continue it.
        if not cache.begin():
            logger.info("%s is complete: nothing is left to do", request.out)
            return True
        # Save the index of tar archives, which another start would have to read again.
        if launch.rank == 0:
            keep_index(source, request.out)
        samples = {cache.parts[0].folder: source} | ({} if heldout is None else {cache.parts[1].folder: heldout})
        total = sum(map(len, cache.blocks))

        def make(numbers: Iterator[int]) -> None:
            """Encode and write these shards."""
            progress = Progress(total, cache.count_done, launch.rank == 0, "images")
            skip = request.bad == "skip"
            encoder = Encoder(
                codec.moments, device, request.batch_size, request.workers, skip, request.timeout, progress.begun
            )
            try:
                for number in numbers:
                    part, rows = cache.shard(number)[0], cache.blocks[number]
                    cache.write(number, encoder.shard(samples[part.folder], part, rows))
                    progress.advance(len(rows))
            finally:
                encoder.close()
                progress.close()

        # Make this process's missing shards. The process that finds all shards present writes the manifest.
        complete = cache.make_share(launch.rank, launch.size, make)
        if complete and launch.rank == 0:
            _log_counts(request.out)
        return complete


def open_autoencoder(request: EncodeRequest, device: torch.device) -> codecs.Autoencoder:
    """The codec of a request, with its own scale and shift. Those are recorded; cached latents are not scaled."""
    roots = () if request.local_diffusers_model_root is None else (request.local_diffusers_model_root,)
    own = read_kl_config(codec_folder(request.codec, roots, f"{SAMPLING_HELP}, or --codec DIR"))
    scale, shift = own.scaling
    config = AutoencoderConfig(name=request.codec, scale=scale, shift=shift, factor=own.factor)
    return codecs.open_autoencoder(config, roots, device, DTYPES[request.precision])


def _describe(
    request: EncodeRequest, codec: codecs.Autoencoder, source: Samples, heldout: Samples | None
) -> CacheDescription:
    """The description of the cache, which must be the same when it is continued."""
    config, size = codec.config, request.image_size
    if size % codec.factor:
        raise ConfigError(f"--image-size: {size} is not a multiple of the codec's factor {codec.factor}")
    side = size // codec.factor
    return CacheDescription(
        version=VERSION,
        codec=CodecRecord(codec.fingerprint(), config.name, codec.factor, codec.channels, config.scale, config.shift),
        crop=CROP,
        size=size,
        flips=FLIPS,
        dtype=request.dtype,
        precision=request.precision,
        shape=(2, codec.channels, side, side),
        names=tuple(source.names) or None,
        source=_record(request, source, training=True),
        heldout=None if heldout is None else ImagesRecord(len(heldout), heldout.fingerprint()),
        shard_size=request.shard_size,
        captions=source.captions().fingerprint() if request.captions else "",
    )


def _decoding(request: EncodeRequest) -> Decoding:
    return Decoding(request.exif, request.background, request.max_pixels)


def _record(request: EncodeRequest, samples: Samples, training: bool) -> SourceRecord:
    cap = request.max_per_class if training else 0
    return SourceRecord(len(samples), samples.fingerprint(), to_dict(_decoding(request)), cap)


def _log_counts(out: Path) -> None:
    for cache in filter(None, open_cache(out, verify=False)):
        logger.info(
            "%s: %s images and their mirror images, %d left out",
            cache.root, f"{len(cache):,}", len(cache.cache.skipped),
        )  # fmt: skip
