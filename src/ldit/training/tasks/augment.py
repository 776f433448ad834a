"""Random augmentation of training images, drawn separately for each image."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ldit.rng import generator
from ldit.training.tasks.inputs import to_device

_NUMBERS = 12  # random numbers of an image, in the order in which `_Draws.between` takes them


def augment(images: Tensor, positions: Sequence[int], seed: int) -> Tensor:
    """Images (B, 3, S, S) in [-1, 1], fp32, rotated by up to 11 degrees, scaled by up to a fifth, shifted by up to a
    sixteenth of the side, with changed colours, blur and noise. Samples of a model may be blurred and noisy.

    The result for an image depends on (seed, its position in the stream) alone.
    """
    draws = _Draws(positions, seed, tuple(images.shape[1:]), images.device)
    # Geometry.
    images = _moved(images, draws)
    # Saturation, then a tint. White stays white, because it often is the background.
    grey = images.mean(1, keepdim=True)  # (B, 1, S, S)
    images = grey + (images - grey) * draws.between(0.6, 1.3, 1)
    images = 1 - (1 - images) * draws.between(0.8, 1.15, 3)
    # Blur three images in ten.
    soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    share = draws.between(0.3, 1.0, 1) * (draws.between(0, 1, 1) < 0.3)
    images = torch.lerp(images, soft, share)
    # Noise, in two images of three.
    images = images + draws.between(-0.05, 0.1, 1).clamp(min=0) * draws.noise
    return images.clamp(-1, 1)


def keep_mask(positions: Sequence[int], seed: int, width: int, dropout: float) -> Tensor:
    """Dropout mask (B, width): 0 with probability `dropout`, else 1/(1 - dropout), drawn by (seed, position)."""
    rows = [torch.rand(width, generator=generator(seed, "dropout", 0, position)) for position in positions]
    return (torch.stack(rows) >= dropout) / (1 - dropout)


def _moved(images: Tensor, draws: "_Draws") -> Tensor:
    """Images rotated, scaled, squeezed and shifted, with reflection padding."""
    angle, scale, squeeze = draws.between(-0.2, 0.2), draws.between(0.8, 1.2), draws.between(0.93, 1.07)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    across, down = draws.between(-0.12, 0.12), draws.between(-0.12, 0.12)
    rows = [torch.stack([cos * squeeze, -sin, across], 1), torch.stack([sin, cos / squeeze, down], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


class _Draws:
    """The random numbers of a batch; each image has its own generator."""

    def __init__(self, positions: Sequence[int], seed: int, shape: tuple[int, ...], device: torch.device) -> None:
        numbers, noise = [], []
        for position in positions:
            own = generator(seed, "augment", 0, position)
            numbers.append(torch.rand(_NUMBERS, generator=own))
            noise.append(torch.randn(shape, generator=own))
        self._numbers, self._taken = to_device(torch.stack(numbers), device), 0
        self.noise = to_device(torch.stack(noise), device)

    def between(self, low: float, high: float, channels: int = 0) -> Tensor:
        """The next uniform numbers: (B,), or (B, channels, 1, 1) to broadcast over images."""
        count = max(channels, 1)
        numbers = low + (high - low) * self._numbers[:, self._taken : self._taken + count]
        self._taken += count
        return numbers[:, :, None, None] if channels else numbers[:, 0]
