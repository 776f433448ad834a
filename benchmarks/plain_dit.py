"""Class-conditional Large-DiT as a reader of the paper would write it: eager, nothing fused, nothing shared with ldit.

It is the yardstick of `forward.py` and an independent check of its arithmetic. Parameters have the published names, so
state dicts load into either network.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldit.config.model import ClassModelConfig

MAX_TOKENS = 4096


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def rotary_table(head_dim: int) -> Tensor:
    """(MAX_TOKENS, d/2) complex64: exp(i · position · 10000^(-2j/d))."""
    frequency = 1.0 / (10000.0 ** (torch.arange(0, head_dim, 2).float() / head_dim))
    angle = torch.outer(torch.arange(MAX_TOKENS).float(), frequency)
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """x (B, T, H, d), table (T, d/2) complex64."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * table[None, :, None, :]).flatten(3).type_as(x)


class Attention(nn.Module):
    def __init__(self, config: ClassModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.n_heads, config.kv_heads, config.head_dim
        kv_width = self.kv_heads * self.head_dim
        self.wq = nn.Linear(config.dim, config.dim, bias=False)
        self.wk = nn.Linear(config.dim, kv_width, bias=False)
        self.wv = nn.Linear(config.dim, kv_width, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)
        self.q_norm: nn.Module = nn.LayerNorm(config.dim) if config.qk_norm else nn.Identity()
        self.k_norm: nn.Module = nn.LayerNorm(kv_width) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = rotate(self.q_norm(self.wq(x)).view(b, t, self.heads, self.head_dim), table)
        k = rotate(self.k_norm(self.wk(x)).view(b, t, self.kv_heads, self.head_dim), table)
        v = self.wv(x).view(b, t, self.kv_heads, self.head_dim)
        if self.kv_heads != self.heads:
            k, v = (part.repeat_interleave(self.heads // self.kv_heads, dim=2) for part in (k, v))
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.wo(out.transpose(1, 2).reshape(b, t, -1))


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, config: ClassModelConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config.dim, config.ffn_hidden)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.cond_dim, 6 * config.dim))

    def forward(self, x: Tensor, table: Tensor, cond: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(cond).chunk(6, dim=1)
        x = x + gate_a.unsqueeze(1) * self.attention(modulate(self.attention_norm(x), shift_a, scale_a), table)
        return x + gate_m.unsqueeze(1) * self.feed_forward(modulate(self.ffn_norm(x), shift_m, scale_m))


class TimestepEmbedder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        frequency = torch.exp(-math.log(10000.0) * torch.arange(128, device=t.device).float() / 128)
        angle = t[:, None].float() * frequency[None]
        features = torch.cat([angle.cos(), angle.sin()], dim=-1)
        return self.mlp(features.to(next(self.parameters()).dtype))


class LabelEmbedder(nn.Module):
    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(rows, width)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class FinalLayer(nn.Module):
    def __init__(self, dim: int, cond_dim: int, out: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(cond_dim, 2 * dim))

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(cond).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class PlainDiT(nn.Module):
    """`model(x, t, y)` of the published form: raster RoPE, x (B, C, H, W), t (B,), y (B,) -> (B, C or 2C, H, W)."""

    table: Tensor

    def __init__(self, config: ClassModelConfig) -> None:
        super().__init__()
        if config.rope != "raster" or config.qk_norm == "head" or config.cond_channels:
            raise ValueError(
                "only the published form is written here: raster RoPE, full-width q/k norm, no extra channels"
            )
        p = config.patch_size
        self.patch, self.out_channels = p, config.out_channels
        self.x_embedder = nn.Linear(config.in_channels * p * p, config.dim)
        self.t_embedder = TimestepEmbedder(config.cond_dim)
        self.y_embedder = LabelEmbedder(config.num_classes + int(config.class_dropout_prob > 0), config.cond_dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.final_layer = FinalLayer(config.dim, config.cond_dim, p * p * config.out_channels)
        self.register_buffer("table", rotary_table(config.head_dim), persistent=False)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        b, c, height, width = x.shape
        p = self.patch
        rows, columns = height // p, width // p
        patches = x.view(b, c, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5)
        tokens = self.x_embedder(patches.reshape(b, rows * columns, c * p * p))
        cond = self.t_embedder(t) + self.y_embedder(y)
        for layer in self.layers:
            tokens = layer(tokens, self.table[: rows * columns], cond)
        out = self.final_layer(tokens, cond).view(b, rows, columns, p, p, self.out_channels)
        return out.permute(0, 5, 1, 3, 2, 4).reshape(b, self.out_channels, height, width)
