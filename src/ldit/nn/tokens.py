"""Images <-> token rows. Input tokens order a patch as (C, p_row, p_col), output tokens as (p_row, p_col, C)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldit.nn.rope import GridScale, attention_scaled, grid_table, raster_table, scaled_raster_table


def patchify(x: Tensor, p: int) -> Tensor:
    """(B, C, H, W) -> (B, H/p, W/p, C·p²); ValueError when p does not divide a side."""
    b, c, h, w = x.shape
    if h % p or w % p:
        raise ValueError(f"size {h}x{w} is not divisible by the patch size {p}")
    return x.view(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5).reshape(b, h // p, w // p, c * p * p)


def unpatchify(tokens: Tensor, p: int) -> Tensor:
    """(B, rows, columns, p²·C) -> (B, C, rows·p, columns·p)."""
    b, rows, columns, _ = tokens.shape
    x = tokens.view(b, rows, columns, p, p, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, -1, rows * p, columns * p)


def rope_table(
    kind: str, rows: int, columns: int, head_dim: int, device: torch.device, grid: GridScale | None = None
) -> Tensor:
    """The table of a plain grid of tokens for `kind` "raster" or "2d", made as in training or as `grid` says."""
    if grid is not None:
        if kind == "2d":
            table = grid_table(rows, columns, head_dim, device, grid=grid)
        else:
            table = scaled_raster_table(rows, columns, head_dim, grid, device)
        return attention_scaled(table, grid.softmax)
    if kind == "2d":
        return grid_table(rows, columns, head_dim, device)
    return raster_table(rows * columns, head_dim, device)


@dataclass(frozen=True)
class TextLayout:
    """Tokens of the text model: every row of patches is followed by `eol`, the sequence padded with `pad`.

    `pack` turns images (one (B, C, H, W) tensor, or a list of (C, H_i, W_i)) into (B, length, D) tokens; `unpack`
    turns the network's output tokens back, list in, list out.
    """

    patch: int
    length: int

    def pack(self, x: Tensor | Sequence[Tensor], embed: nn.Module, eol: Tensor, pad: Tensor) -> Tensor:
        if isinstance(x, Tensor):
            return self._pack(x, embed, eol, pad)
        return torch.cat([self._pack(image[None], embed, eol, pad) for image in x])

    def _pack(self, x: Tensor, embed: nn.Module, eol: Tensor, pad: Tensor) -> Tensor:
        tokens = embed(patchify(x, self.patch))
        b, rows, columns, dim = tokens.shape
        need = rows * (columns + 1)
        if need > self.length:
            raise ValueError(f"size {x.shape[2]}x{x.shape[3]} needs {need} tokens, more than max_seq_len {self.length}")
        rows_with_eol = torch.cat([tokens, eol.expand(b, rows, 1, dim)], dim=2).flatten(1, 2)
        return torch.cat([rows_with_eol, pad.expand(b, self.length - need, dim)], dim=1)

    def unpack(self, tokens: Tensor, x: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
        if isinstance(x, Tensor):
            return self._unpack(tokens, x.shape[-2], x.shape[-1])
        return [self._unpack(tokens[i : i + 1], *x[i].shape[-2:])[0] for i in range(len(x))]

    def _unpack(self, tokens: Tensor, height: int, width: int) -> Tensor:
        rows, columns = height // self.patch, width // self.patch
        grid = tokens[:, : rows * (columns + 1)].unflatten(1, (rows, columns + 1))
        return unpatchify(grid[:, :, :-1], self.patch)

    def rope(
        self, kind: str, x: Tensor | Sequence[Tensor], head_dim: int, scale: float, device: torch.device
    ) -> Tensor:
        """Positions of every token: the flattened index for "raster", (row, column) for "2d", eol one column more."""
        if kind == "raster":
            return raster_table(self.length, head_dim, device, scale)
        shapes = [x.shape[-2:]] if isinstance(x, Tensor) else [image.shape[-2:] for image in x]
        tables = []
        for height, width in shapes:
            rows, columns = height // self.patch, width // self.patch + 1
            spare = -(-self.length // columns)  # pads go on below the image
            tables.append(grid_table(max(rows, spare), columns, head_dim, device, scale)[: self.length])
        return tables[0] if len(tables) == 1 else torch.stack(tables)
