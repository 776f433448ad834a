"""The conditioner of a text model in training: captions of the data, and the frozen text encoder."""

import torch

from ldit.codecs.conditioners import TextConditioner, text_config
from ldit.codecs.text import TextEncoder, check_text_encoder
from ldit.codecs.text_features import TextFeatures
from ldit.config.model import TextModelConfig
from ldit.config.sections import TextConfig
from ldit.config.spec import ModelSpec
from ldit.data.captions import Captions
from ldit.precision import DTYPES


def open_text_conditioner(
    text: TextConfig, spec: ModelSpec, captions: Captions, device: torch.device
) -> TextConditioner:
    """The conditioner of a run on `captions`. Its encoder is read at the first batch; CodecError for one that is
    missing or of another width."""
    config, model = text_config(spec), spec.model
    assert isinstance(model, TextModelConfig)
    check_text_encoder(config, model.cap_feat_dim)
    features = TextFeatures(lambda: TextEncoder(config, (), device, DTYPES[text.precision]))
    # Every batch has the same number of text tokens: compiled blocks and GPU kernels then see one shape.
    return TextConditioner(captions.texts, config.null, text.dropout, features, config.max_tokens)
