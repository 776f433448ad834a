"""A small residual network that classifies images."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldit.config.classifier import ClassifierModelConfig


class _Residual(nn.Module):
    """Two 3x3 convolutions plus a shortcut (He et al. 2016); `stride` 2 halves the sides, rounded up."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, groups: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(groups, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(groups, out_channels)
        has_projection = stride != 1 or in_channels != out_channels
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, bias=False) if has_projection else None

    def forward(self, x: Tensor) -> Tensor:
        residual = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        if self.shortcut is not None:
            x = self.shortcut(F.avg_pool2d(x, self.stride, ceil_mode=True) if self.stride > 1 else x)
        return F.relu(residual + x)


class ClassifierNetwork(nn.Module):
    """Residual convolutional network. With the default widths and nine classes it has 0.62 million parameters.

    Group norms keep no running statistics, so an average of its weights can be used without further work.
    """

    def __init__(self, config: ClassifierModelConfig, classes: int) -> None:
        super().__init__()
        widths, groups = config.widths, config.norm_num_groups
        self.stem = nn.Conv2d(3, widths[0], 3, 2, 1, bias=False)
        self.stem_norm = nn.GroupNorm(groups, widths[0])
        # One block a level; each but the first halves the sides.
        channels = zip((widths[0], *widths[:-1]), widths, strict=True)
        self.levels = nn.ModuleList(_Residual(a, b, 2 if level else 1, groups) for level, (a, b) in enumerate(channels))
        self.head = nn.Linear(widths[-1], classes)

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) in [-1, 1] -> (B, D): the last level, averaged over positions."""
        x = F.relu(self.stem_norm(self.stem(images.contiguous(memory_format=torch.channels_last))))
        for level in self.levels:
            x = level(x)
        return x.mean((2, 3))

    def forward(self, images: Tensor, keep: Tensor | None) -> Tensor:
        """(B, 3, S, S) in [-1, 1] -> logits (B, K). For dropout the features are multiplied by `keep` (B, D)."""
        features = self.features(images)
        logits: Tensor = self.head(features if keep is None else features * keep)
        return logits
