"""Rotary position tables as functions of sizes, and their application (Su et al. 2021).

A table is fp32 (T, d/2, 2): cosine and sine of the angle of each adjacent pair (2i, 2i+1) of a head of width d.
"""

import torch
from torch import Tensor

THETA = 10000.0


def frequencies(dim: int, device: torch.device | str = "cpu", theta: float = THETA) -> Tensor:
    """theta^(-2i/dim) for i < dim/2, fp32."""
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim))


def raster_table(length: int, head_dim: int, device: torch.device | str = "cpu", scale: float = 1.0) -> Tensor:
    """The published 1-D form: position = index in the flattened row-major sequence, divided by `scale`."""
    position = torch.arange(length, dtype=torch.float32, device=device) / scale
    return _table(torch.outer(position, frequencies(head_dim, device)))


def grid_table(
    rows: int, columns: int, head_dim: int, device: torch.device | str = "cpu", scale: float = 1.0
) -> Tensor:
    """The 2-D form: the first half of the pairs turns with the row, the second with the column, theta^(-4i/d)."""
    frequency = frequencies(head_dim // 2, device)
    row = torch.arange(rows, dtype=torch.float32, device=device).repeat_interleave(columns) / scale
    column = torch.arange(columns, dtype=torch.float32, device=device).repeat(rows) / scale
    return _table(torch.cat([torch.outer(row, frequency), torch.outer(column, frequency)], dim=-1))


def _table(angles: Tensor) -> Tensor:
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn the pairs of x (B, T, H, d), fresh, by table (T, d/2, 2) or (B, T, d/2, 2); fp32 inside, x's dtype out.

    On the CPU in eager mode one complex product is faster than four real ones; elsewhere the real form lets compilers
    fuse it (Inductor does not generate complex arithmetic).
    """
    form = rotate_complex if x.device.type == "cpu" else rotate_real
    return form(x.float().unflatten(-1, (-1, 2)), table.unsqueeze(-3)).type_as(x)


def rotate_complex(pairs: Tensor, table: Tensor) -> Tensor:
    """pairs (…, d/2, 2), fresh (overwritten when gradients are off), times table as complex numbers -> (…, d)."""
    numbers, turn = torch.view_as_complex(pairs), torch.view_as_complex(table)
    return torch.view_as_real(numbers * turn if torch.is_grad_enabled() else numbers.mul_(turn)).flatten(-2)


def rotate_real(pairs: Tensor, table: Tensor) -> Tensor:
    """The same from real products."""
    a, b = pairs.unbind(-1)
    cos, sin = table.unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
