"""The original DiT (Peebles & Xie 2023), also SiT's network, with the parameter names of facebookresearch/DiT."""

from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldit.config.model import OriginalDiTConfig
from ldit.nn.conditioning import LabelEmbedder, TimestepEmbedder
from ldit.nn.dit import FinalLayer
from ldit.nn.layers import QKVAttention, Transformer, gated_add, modulate
from ldit.nn.rope import AS_TRAINED, GridScale, ntk_factors
from ldit.nn.tables import TableCache
from ldit.nn.tokens import unpatchify

_MOST_TABLES = 8  # a table of 64 x 64 tokens and width 1152 takes 19 MB
NORM_EPS = 1e-6
DIFFUSERS_EPS = 1e-5  # what diffusers uses in the second norm of a block


def position_table(rows: int, columns: int, dim: int, grid: GridScale = AS_TRAINED) -> Tensor:
    """Sine-cosine table (1, rows·columns, dim): the first half encodes the column, the second the row.

    Each half is [sin | cos] with omega_i = 10000^(-i/(dim/4)). Computed in float64, returned in fp32. `grid` scales
    positions and omegas as it does for RoPE.
    """
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))  # (dim/4,)
    row = torch.arange(rows, dtype=torch.float64).repeat_interleave(columns) / grid.rows
    column = torch.arange(columns, dtype=torch.float64).repeat(rows) / grid.columns
    axes = ((column, grid.ntk_columns), (row, grid.ntk_rows))
    angles = [torch.outer(position, omega * ntk_factors(dim // 4, ntk, omega)) for position, ntk in axes]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1).float()[None]


def fixed_table(config: OriginalDiTConfig) -> Tensor:
    """The position table of the training size, (1, T, D): the parameter `pos_embed`, which is not trained."""
    side = config.input_size // config.patch_size
    return position_table(side, side, config.hidden_size)


class _MLP(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int, second_eps: float) -> None:
        super().__init__()
        self.second_eps = second_eps
        self.attn = QKVAttention(dim, heads)
        self.mlp = _MLP(dim, hidden)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, modulation: Tensor, softmax: float = 1.0) -> Tensor:
        """x (B, T, D), modulation (B, 6, D) -> (B, T, D)."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.unbind(1)  # each (B, D)
        width = x.shape[-1:]
        x = gated_add(x, gate_a, self.attn(modulate(F.layer_norm(x, width, eps=NORM_EPS), shift_a, scale_a), softmax))
        return gated_add(x, gate_m, self.mlp(modulate(F.layer_norm(x, width, eps=self.second_eps), shift_m, scale_m)))


class _PatchEmbed(nn.Module):
    def __init__(self, channels: int, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        # (B, T, D), contiguous: the blocks keep the strides, and each of their norms would copy otherwise.
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()


class OriginalDiT(Transformer):
    """`model(x, t, y)`: x (B, C, H, W), t (B,) as the sinusoids take it, y (B,) labels -> (B, C or 2C, H, W).

    At sizes other than `input_size` the position table is computed for that grid, scaled by `grid` if given.
    """

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        variant: Literal["original", "diffusers"] = "original",
    ) -> None:
        super().__init__()
        self.config = OriginalDiTConfig(
            input_size=input_size,
            patch_size=patch_size,
            in_channels=in_channels,
            hidden_size=hidden_size,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            class_dropout_prob=class_dropout_prob,
            num_classes=num_classes,
            learn_sigma=learn_sigma,
            variant=variant,
        )
        # diffusers' DiT differs in two constants: the divisor of the time's frequencies, and one eps in each block.
        is_diffusers = variant == "diffusers"
        self.x_embedder = _PatchEmbed(in_channels, hidden_size, patch_size)
        self.t_embedder = TimestepEmbedder(hidden_size, last=is_diffusers)
        self.y_embedder = LabelEmbedder(num_classes, class_dropout_prob > 0, hidden_size)
        self.pos_embed = nn.Parameter(fixed_table(self.config), requires_grad=False)
        self._tables = TableCache(_MOST_TABLES)  # of other grids than the stored one
        hidden = round(hidden_size * mlp_ratio)
        eps = DIFFUSERS_EPS if is_diffusers else NORM_EPS
        self.blocks = nn.ModuleList(_Block(hidden_size, num_heads, hidden, eps) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, hidden_size, patch_size**2 * self.config.out_channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, *, grid: GridScale | None = None) -> Tensor:
        """See the class. ValueError when the patch size does not divide the sides."""
        p = self.config.patch_size
        height, width = x.shape[-2:]
        if height % p or width % p:
            raise ValueError(f"size {height}x{width} is not divisible by the patch size {p}")
        rows, columns = height // p, width // p
        # Patches to tokens (B, T, D), plus a position.
        tokens = self.x_embedder(x) + self.position(rows, columns, grid)
        vector = self.t_embedder(t) + self.y_embedder(y)  # (B, D)
        for block in self.blocks:
            # Computed just before its block: under FSDP it is a unit of its own.
            modulation = cast(_Block, block).adaLN_modulation(vector).unflatten(-1, (6, -1))
            tokens = block(tokens, modulation, 1.0 if grid is None else grid.softmax)
        # Tokens to patches of the output.
        out = self.final_layer(tokens, self.final_layer.adaLN_modulation(vector).unflatten(-1, (2, -1)))
        return unpatchify(out.unflatten(1, (rows, columns)), p)

    def position(self, rows: int, columns: int, grid: GridScale | None = None) -> Tensor:
        """The position of every token, (1, T, D): the stored table at the training size, else one computed for this
        grid, on the device and in the dtype of the stored one."""
        stored, side = self.pos_embed, self.config.input_size // self.config.patch_size
        if grid is None and (rows, columns) == (side, side):
            return stored
        scale = grid or AS_TRAINED
        return self._tables.get(
            (rows, columns, scale, stored.device, stored.dtype),
            lambda: position_table(rows, columns, self.config.hidden_size, scale).to(stored),
        )
