"""Rotary position tables (RoPE, Su et al. 2021): computed from sizes, applied to queries and keys.

A table is fp32 (T, d/2, 2): cosine and sine of the angle of each adjacent pair (2i, 2i+1) of a head of width d.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

THETA = 10000.0


@dataclass(frozen=True)
class GridScale:
    """How positions are computed for images of another size than in training.

    `rows`, `columns`: positions along the axis are divided by this (position interpolation, Chen et al. 2023).
    `ntk_rows`, `ntk_columns`: theta is raised so that the axis's lowest frequency is divided by this while its highest
    stays (NTK-aware scaling). Neighbours keep their distance, and the whole image stays within the trained angles.
    `softmax`: factor on the attention logits among the image's tokens.
    `stride`: raster only, how far a row moves the position. The network learnt rows at the distance of the training
    grid's columns, so pass that. None: the columns of the image, which gives the published index.
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
    """Factors (count,) of NTK-aware scaling by `stretch` on the frequencies, highest first: stretch^(-i/(count-1)).

    This equals replacing theta by theta·stretch^(count/(count-1)). A single frequency stays as it is.
    """
    return stretch ** (-torch.arange(count, dtype=like.dtype, device=like.device) / max(count - 1, 1))


def raster_table(length: int, head_dim: int, device: torch.device | str = "cpu", scale: float = 1.0) -> Tensor:
    """The published 1-D form: position = index in the row-major sequence, divided by `scale`."""
    position = torch.arange(length, dtype=torch.float32, device=device) / scale
    return _table(torch.outer(position, frequencies(head_dim, device)))


def scaled_raster_table(
    rows: int, columns: int, head_dim: int, grid: GridScale, device: torch.device | str = "cpu"
) -> Tensor:
    """The 1-D form of a grid of tokens, scaled: the angle of a pair is the sum of its row's and its column's.

    A row counts as `grid.stride` positions. `grid.softmax` is not applied here, see `attention_scaled`.
    """
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
    """The 2-D form: the first half of the pairs encodes the row, the second the column, frequencies theta^(-4i/d).

    `grid.softmax` is not applied here, see `attention_scaled`.
    """
    row = _axis_angles(rows, 1, head_dim // 2, device, scale * grid.rows, grid.ntk_rows)
    column = _axis_angles(columns, 1, head_dim // 2, device, scale * grid.columns, grid.ntk_columns)
    return _table(torch.cat([row.repeat_interleave(columns, 0), column.repeat(rows, 1)], dim=-1))


def unrotated(count: int, head_dim: int, device: torch.device | str = "cpu") -> Tensor:
    """The table of `count` tokens without a position: the angle 0."""
    return _table(torch.zeros(count, head_dim // 2, device=device))


def attention_scaled(table: Tensor, softmax: float) -> Tensor:
    """The table multiplied by sqrt(softmax), so that rotated queries and keys give logits `softmax` times as large.

    This works with any attention kernel (the trick of YaRN, Peng et al. 2023).
    """
    return table if softmax == 1.0 else table * softmax**0.5


def _axis_angles(
    count: int, stride: int, dim: int, device: torch.device | str, interpolation: float, ntk: float
) -> Tensor:
    """Angles (count, dim/2) of `count` positions along an axis, `stride` apart."""
    position = torch.arange(count, dtype=torch.float32, device=device) * stride / interpolation
    frequency = frequencies(dim, device)
    return torch.outer(position, frequency if ntk == 1.0 else frequency * ntk_factors(dim // 2, ntk, frequency))


def _table(angles: Tensor) -> Tensor:
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate the pairs of x (B, T, H, d) by table (T, d/2, 2) or (B, T, d/2, 2); computed in fp32, in x's dtype out.

    Without gradients x may be overwritten. One complex product is faster than four real ones, except in a compiler,
    which can fuse those (Inductor generates no complex arithmetic).
    """
    form = rotate_real if torch.compiler.is_compiling() else rotate_complex
    return form(x.float().unflatten(-1, (-1, 2)), table.unsqueeze(-3)).type_as(x)


def rotate_complex(pairs: Tensor, table: Tensor) -> Tensor:
    """Pairs (…, d/2, 2) times table as complex numbers -> (…, d). Without gradients `pairs` is overwritten."""
    numbers, turn = torch.view_as_complex(pairs), torch.view_as_complex(table)
    return torch.view_as_real(numbers * turn if torch.is_grad_enabled() else numbers.mul_(turn)).flatten(-2)


def rotate_real(pairs: Tensor, table: Tensor) -> Tensor:
    """The same with real products."""
    a, b = pairs.unbind(-1)
    cos, sin = table.unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
