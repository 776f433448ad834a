"""`ldit encode --text`: caches the text features of all captions of a set, resumable, on any number of processes."""

from collections.abc import Iterator, Sequence

from ldit.codecs.text import TextEncoder, feature_width, text_fingerprint, text_folder
from ldit.codecs.text_cache import (
    VERSION,
    TextBlock,
    TextCacheDescription,
    TextCacheJob,
    check_text_cache_dir,
    texts_digest,
)
from ldit.codecs.text_features import TextFeatures
from ldit.config.requests.encode import EncodeRequest
from ldit.config.spec import TextConditionerConfig
from ldit.data.images.decoding import Decoding
from ldit.data.source import data_root, kind_of, open_data, open_whole_cache
from ldit.log import logger
from ldit.parallel.world import launched
from ldit.pipeline.load import process_device
from ldit.precision import DTYPES
from ldit.storage.outputs import refuse_inside
from ldit.storage.progress import Progress


def make_text_cache(request: EncodeRequest) -> bool:
    """Make this process's shards of the cache; whether it is complete afterwards. Errors as in
    `ldit.commands.encode.make_cache`."""
    # The texts: all captions of the set, held-out images included, and the one of guidance.
    root = data_root(request.path)
    check_text_cache_dir(request.out)
    refuse_inside(request.out, [root])
    own = TextConditionerConfig(request.encoder, request.max_tokens, tokenizer=request.tokenizer or None)
    texts = list(dict.fromkeys([*_captions(request), own.null]))
    # The encoder, without its weights, which are read at the first text.
    folder = text_folder(own.encoder)
    tokenizer = text_folder(own.tokenizer) if own.tokenizer else folder
    job = TextCacheDescription(
        VERSION, text_fingerprint(folder, tokenizer), own.encoder, own.max_tokens, request.precision,
        feature_width(folder), len(texts), texts_digest(texts), request.shard_size,
    )  # fmt: skip
    cache = TextCacheJob(request.out, job, texts)
    if not cache.begin():
        logger.info("%s is complete: nothing is left to do", request.out)
        return True
    device, launch = process_device(request.device), launched()
    features = TextFeatures(lambda: TextEncoder(own, (), device, DTYPES[request.precision]), memory=0)

    def make(numbers: Iterator[int]) -> None:
        progress = Progress(len(texts), cache.count_done, launch.rank == 0, "texts")
        try:
            for number in numbers:
                rows = []
                block = cache.blocks[number]
                for first in range(block.start, block.stop, request.batch_size):
                    part = texts[first : min(first + request.batch_size, block.stop)]
                    rows += features(part)
                    progress.begun(len(part))
                cache.write(number, TextBlock(rows))
                progress.advance(len(block))
        finally:
            progress.close()

    return cache.make_share(launch.rank, launch.size, make)


def _captions(request: EncodeRequest) -> Sequence[str]:
    if kind_of(data_root(request.path)) == "cache":
        return open_whole_cache(data_root(request.path))[0].captions().texts
    decoding = Decoding(request.exif, request.background, request.max_pixels)
    return open_data(request.path, request.image_size, "", 0, decoding, request.out)[0].captions().texts
