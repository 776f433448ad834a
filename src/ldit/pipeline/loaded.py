"""LoadedModel: weights in memory, with what they need to make images: spec, process, device, dtype and codec."""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldit.codecs.codec import Codec, open_codec
from ldit.codecs.conditioners import Conditioner, TextConditioner, check_conditioner, text_config
from ldit.codecs.text import TextEncoder
from ldit.codecs.text_features import TextFeatures
from ldit.config.spec import ModelSpec
from ldit.diffusion.build import build_process
from ldit.diffusion.process import Process
from ldit.sampling.fast.options import InferenceCopy, InferenceOptions, is_offloaded


class LoadedModel:
    """`model` is the raw network, `spec` the content of config.json. Codec and inference copy are made when first
    used."""

    def __init__(
        self,
        model: nn.Module,
        spec: ModelSpec,
        source: Path | None = None,
        codec_root: Path | None = None,
        dtype: torch.dtype | None = None,
        codec: Codec | None = None,
        inference: InferenceOptions | None = None,
        process: Process | None = None,
        features: TextFeatures | None = None,
    ) -> None:
        """`inference`: options of the inference copy that samples; None: the network itself samples. `process` is used
        instead of the spec's. `dtype` is for networks whose parameters are converted at each use. `features`: those of
        texts, for a text model; None: from its own encoder."""
        self.model, self.spec, self.source, self.codec_root = model, spec, source, codec_root
        self.inference, self.process = inference, process or build_process(spec.process)
        self._network: Any = None
        self._dtype = dtype
        self._codec, self._features = codec, features
        self._opening = threading.RLock()  # held while codec or inference copy is made, so that each is made once

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the network's inputs: that of its parameters, or the one given to the constructor."""
        return self._dtype or next(self.model.parameters()).dtype

    @property
    def network(self) -> Any:
        """What sampling calls: the inference copy, which is made when first used, and again after the weights moved. It
        is the network itself without `inference` options, or if its blocks are on the host."""
        if self.inference is None or is_offloaded(self.model):
            return self.model
        with self._opening:
            if self._network is None or (isinstance(self._network, InferenceCopy) and not self._network.is_current()):
                from ldit.sampling.fast.prepare import prepare  # not needed in training

                self._network = prepare(self.model, self.inference)
            return self._network

    @property
    def codec(self) -> Codec:
        """The codec, opened on the network's device when first used; CodecError when it is not found."""
        with self._opening:
            if self._codec is None:
                roots, channels = codec_roots(self.codec_root, self.source), self.spec.model.in_channels
                self._codec = open_codec(self.spec.codec, roots, self.device, self._codec_dtype, channels)
            return self._codec

    def opened(self, conditioner: Conditioner) -> Conditioner:
        """The conditioner of a request, able to encode. A text encoder is read at the first prompt, into this model's
        device and dtype; CodecError when it is missing or of another width."""
        if not isinstance(conditioner, TextConditioner):
            return conditioner
        with self._opening:
            if self._features is None:
                config = text_config(self.spec)
                roots = codec_roots(self.codec_root, self.source)
                check_conditioner(self.spec, roots)
                offload = is_offloaded(self.model)
                dtype = torch.float32 if self.device.type == "cpu" else self.dtype
                self._features = TextFeatures(lambda: TextEncoder(config, roots, self.device, dtype, offload))
            return replace(conditioner, features=self._features)

    @property
    def _codec_dtype(self) -> torch.dtype:
        """The network's dtype, but fp32 on the CPU, and instead of fp16, in which autoencoders may overflow."""
        return torch.float32 if self.device.type == "cpu" or self.dtype is torch.float16 else self.dtype


def codec_roots(root: Path | None, source: Path | None) -> list[Path]:
    """Folders in which a model's autoencoder is looked for by name: `root`, and the checkpoint's own folder."""
    own = None if source is None else source if source.is_dir() else source.parent
    return [folder for folder in (root, own) if folder is not None]
