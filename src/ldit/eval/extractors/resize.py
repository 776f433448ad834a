"""Resize rules: images at the size an extractor was trained on.

Metrics are comparable under one rule only, so each extractor has its own and says which."""

import torch
import torch.nn.functional as F
from torch import Tensor


def tf1_bilinear(x: Tensor, size: int) -> Tensor:
    """(B, C, H, W) uint8 or float -> (B, C, size, size) fp32, as TensorFlow 1's ResizeBilinear with align_corners off.

    Output pixel i lies at i·in/out: no offset of half a pixel, no antialiasing. Each difference, product and sum is
    rounded to fp32, columns before rows, as there.
    """
    return _blend(_blend(x.float(), 3, size), 2, size)


def _blend(x: Tensor, axis: int, size: int) -> Tensor:
    """Resize one axis: low + (high - low)·fraction."""
    length = x.shape[axis]
    scale = torch.tensor(length, dtype=torch.float32) / torch.tensor(size, dtype=torch.float32)
    place = torch.arange(size, dtype=torch.float32) * scale
    low = place.long()
    fraction = (place - low).to(x.device)
    if axis == 2:
        fraction = fraction[:, None]
    below = x.index_select(axis, low.to(x.device))
    above = x.index_select(axis, (low + 1).clamp(max=length - 1).to(x.device))
    return above.sub_(below).mul_(fraction).add_(below)  # sums commute exactly


def bicubic(x: Tensor, size: int) -> Tensor:
    """(B, C, H, W) uint8 -> (B, C, size, size) fp32 in [0, 255]: Keys' cubic with a = -1/2, antialiased when it
    shrinks, as Pillow's, but not rounded to whole numbers."""
    if x.shape[-2:] == (size, size):
        return x.float()
    return F.interpolate(x.float(), (size, size), mode="bicubic", antialias=True).clamp_(0.0, 255.0)
