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


def augmented_with_labels(
    images: Tensor, positions: Sequence[int], seed: int, probability: float
) -> tuple[Tensor, Tensor]:
    """Images (B, C, S, S) after augmentations that the network is told of, and the labels (B, 9) that tell it.

    The non-leaking augmentations of Karras et al. 2022 (appendix F.2), each with this probability, drawn by (seed,
    position): mirrored, upside down, scaled by 2^(0.2·n), rotated by any angle, squeezed by 2^(0.2·n) along any axis,
    shifted by n/8 of the side along both, with reflection beyond the edges and n standard normal. The labels are two
    flags, n of the scale, cos - 1 and sin of the angle, n·cos and n·sin of the squeeze, and the shifts; all zero where
    nothing was done.
    """
    drawn = []
    for position in positions:
        own = generator(seed, "augment-labels", 0, position)
        drawn.append(torch.cat([torch.rand(8, generator=own), torch.randn(4, generator=own)]))
    numbers = torch.stack(drawn)  # (B, 12): six draws of "whether", two angles, four normal numbers
    mirrored, flipped, scaled, rotated, squeezed, shifted = (numbers[:, :6] < probability).float().unbind(1)
    turn, axis = (2 * torch.pi * numbers[:, 6:8]).unbind(1)
    size, squeeze, across, down = (
        numbers[:, 8] * scaled, numbers[:, 9] * squeezed, numbers[:, 10] * shifted / 8, numbers[:, 11] * shifted / 8
    )  # fmt: skip
    turn = turn * rotated
    labels = torch.stack(
        [
            mirrored, flipped, size, turn.cos() - 1, turn.sin(), squeeze * axis.cos(), squeeze * axis.sin(),
            8 * across, 8 * down,
        ],
        dim=1,
    )  # fmt: skip
    # From a place in the result to one in the image: the inverses of the steps, the first step's outermost.
    ones = torch.ones(len(numbers))
    steps = [
        _diagonal(1 - 2 * mirrored, 1 - 2 * flipped),
        _diagonal(2 ** (-0.2 * size), 2 ** (-0.2 * size)),
        _rotation(-turn),
        _rotation(axis) @ _diagonal(2 ** (-0.2 * squeeze), 2 ** (0.2 * squeeze)) @ _rotation(-axis),
        _shift(-2 * across * ones, -2 * down * ones),  # the grid's side is 2
    ]
    matrix = steps[0]
    for step in steps[1:]:
        matrix = matrix @ step
    grid = F.affine_grid(to_device(matrix[:, :2].contiguous(), images.device), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    touched = to_device(labels.abs().sum(1) > 0, images.device)[:, None, None, None]
    return torch.where(touched, moved, images), to_device(labels, images.device)


def _diagonal(x: Tensor, y: Tensor) -> Tensor:
    """(B, 3, 3), scaling both axes by x and y (B,)."""
    return torch.diag_embed(torch.stack([x, y, torch.ones_like(x)], dim=1))


def _rotation(angle: Tensor) -> Tensor:
    """(B, 3, 3), rotating by `angle` (B,)."""
    matrix = _diagonal(angle.cos(), angle.cos())
    matrix[:, 0, 1], matrix[:, 1, 0] = -angle.sin(), angle.sin()
    return matrix


def _shift(x: Tensor, y: Tensor) -> Tensor:
    """(B, 3, 3), moving by x and y (B,)."""
    matrix = _diagonal(torch.ones_like(x), torch.ones_like(y))
    matrix[:, 0, 2], matrix[:, 1, 2] = x, y
    return matrix


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
