"""Weights in memory with what they need to make images: network, spec, device, dtype and codec."""

import threading
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldit.codecs.codec import Codec, open_codec
from ldit.config.spec import ModelSpec
from ldit.diffusion.build import build_process
from ldit.diffusion.process import Process
from ldit.sampling.fast.options import InferenceCopy, InferenceOptions, is_offloaded


class LoadedModel:
    """`model` is the raw network, `spec` the content of config.json. Codec and inference copy are made at first use."""

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
    ) -> None:
        """`inference`: sample with an inference copy of the network; None: with the network itself. `process` takes the
        place of the spec's."""
        self.model, self.spec, self.source, self.codec_root = model, spec, source, codec_root
        self.inference, self.process = inference, process or build_process(spec.process)
        self._network: Any = None
        self._dtype = dtype
        self._codec = codec
        self._opening = threading.RLock()  # what is made at first use is made once, whoever asks

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the network takes: its parameters' dtype, or the one given where those are cast as they are used."""
        return self._dtype or next(self.model.parameters()).dtype

    @property
    def network(self) -> Any:
        """What sampling calls: the inference copy, made when first needed and again once the weights have moved, or the
        network itself where there are no `inference` options or its blocks are on the host."""
        if self.inference is None or is_offloaded(self.model):
            return self.model
        with self._opening:
            if self._network is None or (isinstance(self._network, InferenceCopy) and not self._network.is_current()):
                from ldit.sampling.fast.prepare import prepare  # training samples with the network itself

                self._network = prepare(self.model, self.inference)
            return self._network

    @property
    def codec(self) -> Codec:
        """Opened at first use on the network's device; CodecError when it is not found."""
        with self._opening:
            if self._codec is None:
                roots, channels = codec_roots(self.codec_root, self.source), self.spec.model.in_channels
                self._codec = open_codec(self.spec.codec, roots, self.device, self._codec_dtype, channels)
            return self._codec

    @property
    def _codec_dtype(self) -> torch.dtype:
        """fp32 on the CPU and where the network is in fp16, which autoencoders may overflow; else the network's."""
        return torch.float32 if self.device.type == "cpu" or self.dtype is torch.float16 else self.dtype


def codec_roots(root: Path | None, source: Path | None) -> list[Path]:
    """Where a model's autoencoder is looked for by name: the folder given, and the checkpoint's own."""
    own = None if source is None else source if source.is_dir() else source.parent
    return [folder for folder in (root, own) if folder is not None]
