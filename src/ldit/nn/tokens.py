"""Images <-> sequences of tokens, and the positions of the tokens.

A patch is ordered (C, p_row, p_col) in input tokens and (p_row, p_col, C) in output tokens, as in the original.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ldit.nn.rope import AS_TRAINED, GridScale, attention_scaled, grid_table, raster_table, scaled_raster_table


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


def split_patches(x: Tensor, rows: int, columns: int) -> Tensor:
    """Tokens of 4·D values over a grid, (B, rows·columns, 4·D) -> tokens of D over one twice as fine,
    (B, 2·rows·2·columns, D). The values of a token are ordered (row, column, D) of its four parts."""
    x = x.unflatten(-1, (2, 2, -1)).unflatten(1, (rows, columns))  # (B, rows, columns, 2, 2, D)
    return x.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 3)


def rope_table(
    kind: str, rows: int, columns: int, head_dim: int, device: torch.device, grid: GridScale | None = None
) -> Tensor:
    """The rotary table of a grid of tokens, `kind` "raster" or "2d": as in training, or scaled by `grid`."""
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
    """Tokens of the text model: an end-of-line token after every row of patches, then padding up to `length`.

    `pack` turns images, one tensor (B, C, H, W) or a list of (C, H_i, W_i), into tokens (B, length, D). `unpack` turns
    output tokens back into images of the same sizes; a list gives a list.
    """

    patch: int
    length: int

    def pack(self, x: Tensor | Sequence[Tensor], embed: nn.Module, eol: Tensor, pad: Tensor) -> Tensor:
        if isinstance(x, Tensor):
            return self._pack(x, embed, eol, pad)
        return torch.cat([self._pack(image[None], embed, eol, pad) for image in x])

    def _pack(self, x: Tensor, embed: nn.Module, eol: Tensor, pad: Tensor) -> Tensor:
        tokens = embed(patchify(x, self.patch))  # (B, rows, columns, D)
        b, rows, columns, dim = tokens.shape
        with_eol = torch.cat([tokens, eol.expand(b, rows, 1, dim)], dim=2).flatten(1, 2)  # (B, rows·(columns + 1), D)
        missing = self._length(rows, columns + 1) - with_eol.shape[1]
        return torch.cat([with_eol, pad.expand(b, missing, dim)], dim=1)  # (B, length, D)

    def _length(self, rows: int, columns: int) -> int:
        """Tokens of an image with padding: of one larger than any in training, as many as it has."""
        return max(self.length, rows * columns)

    def unpack(self, tokens: Tensor, x: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
        if isinstance(x, Tensor):
            return self._unpack(tokens, x.shape[-2], x.shape[-1])
        return [self._unpack(tokens[i : i + 1], *x[i].shape[-2:])[0] for i in range(len(x))]

    def _unpack(self, tokens: Tensor, height: int, width: int) -> Tensor:
        rows, columns = height // self.patch, width // self.patch
        grid = tokens[:, : rows * (columns + 1)].unflatten(1, (rows, columns + 1))  # the padding cut off
        return unpatchify(grid[:, :, :-1], self.patch)

    def rope(
        self,
        kind: str,
        x: Tensor | Sequence[Tensor],
        head_dim: int,
        scale: float,
        device: torch.device,
        grid: GridScale | None = None,
    ) -> Tensor:
        """Rotary table of every token, padding included: by sequence index for "raster", by row and column for "2d";
        with `grid` scaled. Its softmax is not for text models, whose queries attend to the text as well."""
        shapes = [x.shape[-2:]] if isinstance(x, Tensor) else [image.shape[-2:] for image in x]
        tables = []
        for height, width in shapes:
            rows, columns = height // self.patch, width // self.patch + 1  # end-of-line tokens are a column
            length = self._length(rows, columns)
            padded_rows = -(-length // columns)  # padding continues below the image
            if kind == "2d":
                table = grid_table(padded_rows, columns, head_dim, device, scale, grid or AS_TRAINED)
            elif grid is None:
                table = raster_table(length, head_dim, device, scale)
            else:
                own = replace(grid, rows=grid.rows * scale, columns=grid.columns * scale)
                table = scaled_raster_table(padded_rows, columns, head_dim, own, device)
            tables.append(table[:length])
        return tables[0] if len(tables) == 1 or kind == "raster" else torch.stack(tables)
