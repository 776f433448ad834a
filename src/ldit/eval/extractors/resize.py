"""Resize rules of the extractors.

Metrics are comparable only under the same rule, so each extractor has its own, and reports state it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def tf1_bilinear(x: Tensor, size: int) -> Tensor:
    """(B, C, H, W) uint8 or float -> (B, C, size, size) fp32, as TensorFlow 1's ResizeBilinear without align_corners.

    Output pixel i is at i·in/out: no offset of half a pixel, no antialiasing. Differences, products and sums are
    rounded to fp32 in TensorFlow's order, columns before rows.
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
    return above.sub_(below).mul_(fraction).add_(below)  # addition is commutative, also in floating point


def bicubic(x: Tensor, size: int) -> Tensor:
    """(B, C, H, W) uint8 -> (B, C, size, size) fp32 in [0, 255]: Keys' cubic with a = -1/2, antialiased when
    downsampling, as in Pillow, but not rounded to integers."""
    if x.shape[-2:] == (size, size):
        return x.float()
    return F.interpolate(x.float(), (size, size), mode="bicubic", antialias=True).clamp_(0.0, 255.0)
