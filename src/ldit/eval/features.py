"""What an extractor gives for a batch of images, and what an extractor is."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Features:
    """Features of a batch, fp32 on the extractor's device: `pool` (B, D); `spatial` (B, S) from Inception alone, for
    sFID; `logits` (B, K) for the Inception Score, from Inception by the head without its bias."""

    pool: Tensor
    spatial: Tensor | None = None
    logits: Tensor | None = None


class Extractor(Protocol):
    """A network on its device. Metrics are comparable where `fingerprint` and `resize` are the same."""

    @property
    def name(self) -> str:
        """As in reports: "inception", "efficientnet-lite0", "classifier"."""

    @property
    def fingerprint(self) -> str:
        """sha256 of the weights' file."""

    @property
    def resize(self) -> str:
        """The resize rule in words."""

    @property
    def width(self) -> int:
        """D, the number of pool features."""

    @property
    def spatial(self) -> int:
        """S, the number of spatial features; 0 without."""

    @property
    def metric(self) -> str:
        """The name of the Frechet distance in these features: "fid" for Inception alone, else "fd_<name>"."""

    def __call__(self, images: Tensor) -> Features:
        """uint8 (B, 3, H, W), RGB, of any size, on any device."""
