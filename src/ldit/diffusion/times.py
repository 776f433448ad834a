"""Training times from given random numbers, and the resolution shift. No random state here."""

import torch
from torch import Tensor


def uniform_index(u: Tensor, steps: int) -> Tensor:
    """Indices 0..steps-1 from u in [0, 1)."""
    return (u * steps).long().clamp(max=steps - 1)


def logit_normal(normal: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """t = sigmoid(mean + std·normal) in (0, 1) (Esser et al. 2024)."""
    return torch.sigmoid(mean + std * normal)


def shifted(t: Tensor, shift: float) -> Tensor:
    """t' = k·t / (1 + (k-1)·t); k > 1 is noisier, for larger images."""
    return shift * t / (1.0 + (shift - 1.0) * t)
