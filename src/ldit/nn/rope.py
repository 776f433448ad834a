"""Rotary position tables as functions of sizes, and their application (Su et al. 2021).

A table is fp32 (T, d/2, 2): cosine and sine of the angle of each adjacent pair (2i, 2i+1) of a head of width d.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

THETA = 10000.0


@dataclass(frozen=True)
class GridScale:
    """How positions are made for one call, where an image has another size than those of training.

    `rows`, `columns`: positions along the axis are divided by it (position interpolation, Chen et al. 2023).
    `ntk_rows`, `ntk_columns`: theta is multiplied so that the lowest frequency of the axis is divided by it and the
    highest stays (NTK-aware scaling): fine order is kept, the whole image still fits into the trained turn.
    `softmax`: factor on the logits of attention among the image's tokens.
    `stride`: raster only, what one row adds to the position: the columns of the training grid, whose rows the network
    knows by that distance. None: the columns there are, the published index.
    """

    rows: float = 1.0
    columns: float = 1.0
    ntk_rows: float = 1.0
    ntk_columns: float = 1.0
    softmax: float = 1.0
    stride: int | None = None


AS_TRAINED = GridScale()


def frequencies(dim: int, device: torch.device | str = "cpu", theta: float = THETA) -> Tensor:
    """theta^(-2i/dim) for i < dim/2, fp32."""
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim))


def ntk_factors(count: int, stretch: float, like: Tensor) -> Tensor:
    """What NTK-aware scaling by `stretch` makes of frequency i of `count`, highest first: stretch^(-i/(count-1)), which
    is theta·stretch^(count/(count-1)) in the place of theta. A lone frequency is the highest and stays."""
    return stretch ** (-torch.arange(count, dtype=like.dtype, device=like.device) / max(count - 1, 1))


def raster_table(length: int, head_dim: int, device: torch.device | str = "cpu", scale: float = 1.0) -> Tensor:
    """The published 1-D form: position = index in the flattened row-major sequence, divided by `scale`."""
    position = torch.arange(length, dtype=torch.float32, device=device) / scale
    return _table(torch.outer(position, frequencies(head_dim, device)))


def scaled_raster_table(
    rows: int, columns: int, head_dim: int, grid: GridScale, device: torch.device | str = "cpu"
) -> Tensor:
    """The 1-D form of a grid of tokens, scaled: every pair turns by its angle of the row, `stride` positions each, and
    by that of the column. Its logits' factor is not in it, see `attention_scaled`."""
    stride = columns if grid.stride is None else grid.stride
    row = _axis_angles(rows, stride, head_dim, device, grid.rows, grid.ntk_rows)
    column = _axis_angles(columns, 1, head_dim, device, grid.columns, grid.ntk_columns)
    return _table((row[:, None] + column).flatten(0, 1))


def grid_table(
    rows: int,
    columns: int,
    head_dim: int,
    device: torch.device | str = "cpu",
    scale: float = 1.0,
    grid: GridScale = AS_TRAINED,
) -> Tensor:
    """The 2-D form: the first half of the pairs turns with the row, the second with the column, theta^(-4i/d). The
    factor of `grid` on logits is not in it, see `attention_scaled`."""
    row = _axis_angles(rows, 1, head_dim // 2, device, scale * grid.rows, grid.ntk_rows)
    column = _axis_angles(columns, 1, head_dim // 2, device, scale * grid.columns, grid.ntk_columns)
    return _table(torch.cat([row.repeat_interleave(columns, 0), column.repeat(rows, 1)], dim=-1))


def attention_scaled(table: Tensor, softmax: float) -> Tensor:
    """The table with pairs of length sqrt(softmax): turned queries and keys give logits `softmax` times as large, in
    whatever kernel computes them (Peng et al. 2023, YaRN, do the same)."""
    return table if softmax == 1.0 else table * softmax**0.5


def _axis_angles(
    count: int, stride: int, dim: int, device: torch.device | str, interpolation: float, ntk: float
) -> Tensor:
    """Angles (count, dim/2) of the positions of an axis, `stride` apart."""
    position = torch.arange(count, dtype=torch.float32, device=device) * stride / interpolation
    frequency = frequencies(dim, device)
    return torch.outer(position, frequency if ntk == 1.0 else frequency * ntk_factors(dim // 2, ntk, frequency))


def _table(angles: Tensor) -> Tensor:
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn the pairs of x (B, T, H, d), fresh, by table (T, d/2, 2) or (B, T, d/2, 2); fp32 inside, x's dtype out.

    On the CPU in eager mode one complex product is faster than four real ones; elsewhere the real form lets compilers
    fuse it (Inductor does not generate complex arithmetic).
    """
    form = rotate_complex if x.device.type == "cpu" and not torch.compiler.is_compiling() else rotate_real
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
