"""The conditioner of a text model in training: captions of the data, and the frozen text encoder or its cache."""

from itertools import chain
from pathlib import Path
from typing import Any

import torch

from ldit.codecs.conditioners import TextConditioner, text_config
from ldit.codecs.text import TextEncoder, check_text_encoder, find_text_model, text_fingerprint, text_folder
from ldit.codecs.text_cache import TextCache
from ldit.codecs.text_features import TextFeatures
from ldit.config.model import TextModelConfig
from ldit.config.sections import TextConfig
from ldit.config.spec import ModelSpec, TextConditionerConfig
from ldit.data.captions import Captions
from ldit.errors import CodecError
from ldit.log import logger
from ldit.precision import DTYPES


def open_text_conditioner(
    text: TextConfig, spec: ModelSpec, captions: Captions, device: torch.device, verify: bool = True
) -> TextConditioner:
    """The conditioner of a run on `captions`. Its encoder is read at the first text that a cache does not have;
    CodecError for one that is missing or of another width."""
    config, model = text_config(spec), spec.model
    assert isinstance(model, TextModelConfig)
    cache = _open_cache(text, config, model.cap_feat_dim, verify) if text.cache else None
    missing = 1
    if cache is not None:
        texts = chain(captions.texts, [config.null], text.prompts)
        missing = sum(cache.place(one) is None for one in texts)
        if missing:
            logger.warning("text.cache: %s lacks %s texts, which are encoded here", text.cache, f"{missing:,}")
    if missing:
        check_text_encoder(config, model.cap_feat_dim)
    features = TextFeatures(lambda: TextEncoder(config, (), device, DTYPES[text.precision], text.offload), cache=cache)
    # Every batch has the same number of text tokens: compiled blocks and GPU kernels then see one shape.
    encoder = _fingerprint(config) if cache is None else cache.job.encoder
    return TextConditioner(
        captions.texts, config.null, text.dropout, features, config.max_tokens, encoder, config.has_null
    )


def _fingerprint(config: TextConditionerConfig) -> str:
    folder = text_folder(config.encoder)
    return text_fingerprint(folder, text_folder(config.tokenizer) if config.tokenizer else folder)


def _open_cache(text: TextConfig, config: TextConditionerConfig, width: int, verify: bool) -> TextCache:
    """The cache of a run; CodecError when another encoder made it. Of an encoder that is not found the name is compared
    in place of its files."""
    cache = TextCache(Path(text.cache), verify)
    folder = find_text_model(config.encoder)
    tokenizer = find_text_model(config.tokenizer) if config.tokenizer else folder
    facts: list[tuple[str, Any, Any]]
    facts = [("max_tokens", cache.job.max_tokens, config.max_tokens), ("width", cache.job.width, width)]
    if folder is None or tokenizer is None:
        facts.append(("encoder", Path(cache.job.name).name, Path(config.encoder).name))
    else:
        facts.append(("encoder of fingerprint", cache.job.encoder, text_fingerprint(folder, tokenizer)))
    facts.append(("precision", cache.job.precision, text.precision))
    for fact, made, needed in facts:
        if made != needed:
            made, needed = str(made)[:16], str(needed)[:16]
            raise CodecError(f"text.cache: {text.cache} was made with {fact} {made}, the run has {needed}")
    return cache
