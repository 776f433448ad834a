"""Checks and conversions that all metrics need: finite rows, on a device with float64."""

import torch
from torch import Tensor

from ldit.errors import EvaluationError


def float64_home(device: torch.device) -> torch.device:
    """The device itself, or the CPU if the device has no float64 (Apple's MPS)."""
    return torch.device("cpu") if device.type == "mps" else device


def double(rows: Tensor) -> Tensor:
    """The rows in float64, on their device if it has float64."""
    return rows.detach().to(float64_home(rows.device)).to(torch.float64)


def check_finite(rows: Tensor, what: str, first: int = 0) -> None:
    """EvaluationError for the first row of (B, D) that holds NaN or infinity; row 0 is image `first`."""
    if not rows.numel() or torch.isfinite(torch.stack(rows.aminmax())).all():  # one pass; NaN is both of the two
        return
    at = int((~torch.isfinite(rows).all(dim=1)).nonzero()[0])
    raise EvaluationError(f"{what} of image {first + at} are not finite")


def two_sets(samples: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """Two sets of features (N, D) and (M, D), checked, both on the samples' device or a device with float64."""
    for rows, what in ((samples, "features"), (references, "reference features")):
        if rows.ndim != 2:
            raise ValueError(f"{what}: expected rows, got the shape {tuple(rows.shape)}")
        check_finite(rows, what)
    if samples.shape[1] != references.shape[1]:
        raise EvaluationError(
            f"{samples.shape[1]} features and {references.shape[1]} reference features: not of the same extractor"
        )
    home = float64_home(samples.device)
    return samples.detach().to(home), references.detach().to(home)
