"""Embeds what the network is conditioned on: time, and a class or a text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldit.nn.layers import timestep_features

FEATURES = 256


class TimestepEmbedder(nn.Module):
    """256 sinusoids in fp32, then Linear, SiLU, Linear in the weights' dtype; t (B,) -> (B, width).

    `last` is that of `timestep_features`.
    """

    def __init__(self, width: int, last: bool = False) -> None:
        super().__init__()
        self.last = last
        self.mlp = nn.Sequential(nn.Linear(FEATURES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        weight: Tensor = self.mlp[0].weight  # type: ignore[assignment]
        return self.mlp(timestep_features(t, FEATURES, last=self.last).to(weight.dtype))


@dataclass(frozen=True)
class TrainingInputs:
    """What a network is given in training alone, a row for each sample.

    `augmentation` (B, 9): how the image was augmented (`model.augment_labels`).
    `kept` (B, K): indices of the image tokens that pass through the blocks `routed` = (first, last + 1); the others
    skip them (TREAD, Krause et al. 2025).
    `seeds` (B,) int64, `dropout`: random seeds, and the share of each block's updates that is dropped.
    """

    augmentation: Tensor | None = None
    kept: Tensor | None = None
    routed: tuple[int, int] = (0, 0)
    seeds: Tensor | None = None
    dropout: float = 0.0


class LabelEmbedder(nn.Module):
    """A table of class vectors. `null` adds a row for "no class", which classifier-free guidance needs.

    Without classes the table has that one row, whatever `null` is.
    """

    def __init__(self, num_classes: int, null: bool, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + int(null or num_classes == 0), width)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


@dataclass(frozen=True)
class TextCondition:
    """Text features (B, T, F) and a bool mask (B, T), True = a token of the text."""

    features: Tensor
    mask: Tensor

    def __post_init__(self) -> None:
        if self.features.ndim != 3 or self.mask.shape != self.features.shape[:2]:
            raise ValueError(f"features {tuple(self.features.shape)} and mask {tuple(self.mask.shape)} do not fit")
        if self.mask.dtype != torch.bool:
            raise ValueError(f"mask must be bool, got {self.mask.dtype}")

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int | slice | Tensor | Sequence[int]) -> "TextCondition":
        """The texts at `index`; an int gives a batch of one."""
        if isinstance(index, int):
            index = [index]
        return TextCondition(self.features[index], self.mask[index])

    def to(self, *args: Any, **kwargs: Any) -> "TextCondition":
        """As torch.Tensor.to for the features; the mask moves to their device and stays bool."""
        features = self.features.to(*args, **kwargs)
        return TextCondition(features, self.mask.to(features.device))

    @staticmethod
    def cat(parts: Sequence["TextCondition"]) -> "TextCondition":
        """Concatenate along the batch; shorter texts are padded with masked zeros."""
        length = max(part.features.shape[1] for part in parts)
        pads = [length - part.features.shape[1] for part in parts]
        features = [nn.functional.pad(part.features, (0, 0, 0, n)) for part, n in zip(parts, pads, strict=True)]
        masks = [nn.functional.pad(part.mask, (0, n)) for part, n in zip(parts, pads, strict=True)]
        return TextCondition(torch.cat(features), torch.cat(masks))

    def mean(self) -> Tensor:
        """Mean of the features over the text's tokens, (B, F); zero for a text without tokens."""
        weight = self.mask.unsqueeze(-1).to(self.features.dtype)  # (B, T, 1)
        return (self.features * weight).sum(1) / weight.sum(1).clamp(min=1)
