"""The Extractor protocol, and the features that it returns for a batch of images."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Features:
    """Features of a batch, fp32 on the extractor's device: `pool` (B, D); `spatial` (B, S), for sFID, from Inception
    only; `logits` (B, K), for the Inception Score. Inception's logits omit the bias of the head."""

    pool: Tensor
    spatial: Tensor | None = None
    logits: Tensor | None = None


class Extractor(Protocol):
    """A network on its device. Metrics are comparable if `fingerprint` and `resize` are the same."""

    @property
    def name(self) -> str:
        """The name in reports: "inception", "efficientnet-lite0", "classifier"."""

    @property
    def fingerprint(self) -> str:
        """sha256 of the weight file."""

    @property
    def resize(self) -> str:
        """The resize rule in words."""

    @property
    def width(self) -> int:
        """D, the number of pool features."""

    @property
    def spatial(self) -> int:
        """S, the number of spatial features; 0 = none."""

    @property
    def metric(self) -> str:
        """The name of the Fréchet distance in these features: "fid" for Inception, else "fd_<name>"."""

    def __call__(self, images: Tensor) -> Features:
        """uint8 (B, 3, H, W), RGB, of any size, on any device."""
