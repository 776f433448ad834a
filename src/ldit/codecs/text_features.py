"""Features of texts: from a cache on disk, from memory, or from the encoder."""

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldit.codecs.text import TextEncoder
from ldit.codecs.text_cache import TextCache
from ldit.nn.conditioning import TextCondition

MEMORY = 1 << 29
"""Bytes of features that are kept in memory."""


class TextFeatures:
    """The features of texts, each (T, F) on the host: of `cache` where it has them, else of the encoder, which is
    opened at the first text that needs it. What it computed is kept in memory until `memory` bytes are full."""

    def __init__(
        self, open_encoder: Callable[[], TextEncoder], memory: int = MEMORY, cache: TextCache | None = None
    ) -> None:
        self._open_encoder, self._memory, self._cache = open_encoder, memory, cache
        self._encoder: TextEncoder | None = None
        self._kept: dict[str, Tensor] = {}
        self._lock = threading.Lock()  # requests may come from several threads

    def __call__(self, texts: Sequence[str]) -> list[Tensor]:
        with self._lock:
            found = {text: self._kept[text] for text in texts if text in self._kept}
            if self._cache is not None:
                for text in dict.fromkeys(one for one in texts if one not in found):
                    if (features := self._cache.get(text)) is not None:
                        found[text] = features
            missing = [text for text in dict.fromkeys(texts) if text not in found]
            if missing:
                found.update(zip(missing, self._encoded(missing), strict=True))
                for text in missing:
                    self._keep(text, found[text])
            return [found[text] for text in texts]

    def encoder(self) -> TextEncoder:
        if self._encoder is None:
            self._encoder = self._open_encoder()
        return self._encoder

    def _encoded(self, texts: Sequence[str]) -> list[Tensor]:
        condition = self.encoder()(texts)
        rows = zip(condition.features.cpu(), condition.mask.cpu(), strict=True)
        return [features[mask] for features, mask in rows]

    def _keep(self, text: str, features: Tensor) -> None:
        size = features.numel() * features.element_size()
        if size <= self._memory:
            self._memory -= size
            self._kept[text] = features.clone()  # a view would keep its whole batch


def stacked(rows: Sequence[Tensor], length: int | None = None, device: torch.device | None = None) -> TextCondition:
    """Features (T_i, F) on the host as one batch (B, T, F) on `device`, T = `length` or that of the longest."""
    length = max(map(len, rows)) if length is None else length
    features = torch.stack([torch.nn.functional.pad(row, (0, 0, 0, length - len(row))) for row in rows])
    mask = torch.arange(length) < torch.tensor([len(row) for row in rows])[:, None]
    if device is not None and device.type == "cuda":  # without making the host wait
        features, mask = (value.pin_memory().to(device, non_blocking=True) for value in (features, mask))
    return TextCondition(features.to(device), mask.to(device))
