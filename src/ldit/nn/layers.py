"""Layers: normalisation, SwiGLU, attention, timestep features.

Shapes: B batch, T tokens, D width, H heads, d head width, F text feature width, L text tokens.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldit.config.model import BackboneConfig
from ldit.nn.rope import rotate

QK_NORM_EPS = 1e-5  # a constant of the original, independent of norm_eps


class Transformer(nn.Module):
    """A network whose forward pass is mostly that of its `blocks`, each with an `adaLN_modulation` (None: they share
    one). Parallelism, recomputation and compilation take the blocks one by one."""


class RMSNorm(nn.Module):
    """x · rsqrt(mean(x²) + eps) · weight over the last axis, statistics in fp32 (Zhang & Sennrich 2019)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def _reused(fresh: Tensor) -> Tensor | None:
    """The `out` argument of an element-wise product: its fresh operand, unless a gradient needs that later.

    Reusing the memory is faster: large temporaries that are freed and allocated again cost a page fault every 4 KiB.
    """
    return None if torch.is_grad_enabled() else fresh


class SwiGLU(nn.Module):
    """w2(SiLU(w1 x) · w3 x), no biases (Shazeer 2020)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.w1(x)
        gate = F.silu(gate, inplace=not torch.is_grad_enabled())
        return self.w2(torch.mul(gate, self.w3(x), out=_reused(gate)))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x·(1 + scale) + shift; x (B, T, D), shift and scale (B, D). Without gradients x is overwritten."""
    return torch.addcmul(shift.unsqueeze(1), x, (1 + scale).unsqueeze(1), out=_reused(x))


def gated_add(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    """x + gate·update; x and update (B, T, D), gate (B, D). Without gradients update is overwritten."""
    return torch.addcmul(x, gate.unsqueeze(1), update, out=_reused(update))


def dropped(x: Tensor, seeds: Tensor, rate: float) -> Tensor:
    """x (B, T, D) with a share `rate` of its values set to 0 and the others divided by 1 - rate.

    Which ones follows from seeds (B,) int64 and the place of the value in its sample, by an integer hash: so they are
    the same on every device, in every batch and in a second forward pass.
    """
    place = torch.arange(x[0].numel(), device=x.device).view(x.shape[1:])  # (T, D)
    h = (seeds[:, None, None] ^ (place * 0x9E3779B1)) & 0xFFFFFFFF
    # The finaliser of MurmurHash3, in 64-bit integers.
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = ((h ^ (h >> shift)) * factor) & 0xFFFFFFFF
    h = h ^ (h >> 16)
    return torch.where(h >= int(rate * 2**32), x / (1 - rate), 0.0)


def timestep_features(t: Tensor, dim: int = 256, max_period: float = 10000.0, last: bool = False) -> Tensor:
    """Sinusoids [cos(t·f) | sin(t·f)] in fp32 with f_i = max_period^(-i/(dim/2)); t (B,) -> (B, dim).

    With `last` the divisor is dim/2 - 1, so that the last frequency is 1/max_period, as in diffusers.
    """
    half = dim // 2
    index = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * torch.exp(-math.log(max_period) * index / (half - last))[None]  # (B, dim/2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """torch's attention of q, k, v (B, H, T, d) with its options; in fp32 where training in bf16 on a CPU.

    There the backward pass in bf16 takes four times as long as that in fp32 (LOG.md, 2026-11-30).
    """
    if q.dtype == torch.bfloat16 and q.device.type == "cpu" and torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **options).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, **options)


class Attention(nn.Module):
    """Bidirectional attention with normalised queries and keys, RoPE and grouped-query heads (Large-DiT).

    Text models add a second, gated attention from the same rotated queries to the text, whose features are
    `context_dim` wide. `config.qk_norm`, applied before RoPE: False; True = affine LayerNorm over the full projected
    width, all heads together; "head" = RMSNorm of each head.
    """

    def __init__(self, config: BackboneConfig, context_dim: int | None = None) -> None:
        super().__init__()
        dim, d = config.dim, config.head_dim
        self.heads, self.kv_heads, self.head_dim = config.n_heads, config.kv_heads, d
        self.norm_heads = config.qk_norm == "head"
        kv_width = self.kv_heads * d
        # Self-attention.
        self.wq = nn.Linear(dim, dim, bias=False)
        self.wk = nn.Linear(dim, kv_width, bias=False)
        self.wv = nn.Linear(dim, kv_width, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)
        self.q_norm = self._norm(config, dim)
        self.k_norm = self._norm(config, kv_width)
        self.value_mix = nn.Parameter(torch.ones(2, self.kv_heads)) if config.value_residual else None
        # Attention to the text; its gate starts at zero, one number a head.
        if context_dim is not None:
            self.wk_y = nn.Linear(context_dim, kv_width, bias=False)
            self.wv_y = nn.Linear(context_dim, kv_width, bias=False)
            self.ky_norm = self._norm(config, kv_width)
            self.gate = nn.Parameter(torch.zeros(self.heads))

    @staticmethod
    def _norm(config: BackboneConfig, width: int) -> nn.Module:
        if config.qk_norm == "head":
            return RMSNorm(config.head_dim, QK_NORM_EPS)
        return nn.LayerNorm(width, eps=QK_NORM_EPS) if config.qk_norm else nn.Identity()

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values before any norm; the inference copy computes them in one product."""
        return self.wq(x), self.wk(x), self.wv(x)

    def _heads(self, x: Tensor, heads: int, norm: nn.Module) -> Tensor:
        """Normalise and split: (B, T, heads·d) -> (B, T, heads, d)."""
        shape = (*x.shape[:-1], heads, self.head_dim)
        return norm(x.view(shape)) if self.norm_heads else norm(x).view(shape)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return attend(q, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, enable_gqa=self.heads != self.kv_heads)

    def forward(
        self,
        x: Tensor,
        rope: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        values: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x (B, T, D), rope (T, d/2, 2), context (B, L, F) and mask (B, L), True = attend -> (B, T, D).

        With value residuals (Zhou et al. 2024) `values` (B, T, kv_heads, d) are those of the first block, None in that
        block itself; they are mixed with this block's, and returned besides.
        """
        # Attention among the image tokens.
        q, k, v = self._project(x)
        q = rotate(self._heads(q, self.heads, self.q_norm), rope).transpose(1, 2)  # (B, H, T, d)
        k = rotate(self._heads(k, self.kv_heads, self.k_norm), rope)  # (B, T, kv_heads, d)
        v = v.unflatten(-1, (self.kv_heads, self.head_dim))  # (B, T, kv_heads, d)
        if self.value_mix is not None:
            values = v if values is None else values
            own, first = self.value_mix.unsqueeze(-1).unbind()  # (kv_heads, 1) each
            v = own * v + first * values
        out = self._attend(q, k, v)  # (B, H, T, d)
        # The same queries attend to the text, whose keys have no positions; a gate a head adds the result.
        if context is not None:
            k_y = self._heads(self.wk_y(context), self.kv_heads, self.ky_norm)  # (B, L, kv_heads, d)
            v_y = self.wv_y(context).unflatten(-1, (self.kv_heads, self.head_dim))
            text = self._attend(q, k_y, v_y, None if mask is None else mask[:, None, None, :])
            out = out + text * self.gate.tanh()[None, :, None, None]
        out = self.wo(out.transpose(1, 2).flatten(2))
        return out if values is None else (out, values)


class QKVAttention(nn.Module):
    """Self-attention of the original DiT: queries, keys and values from one linear layer, no norms, no rotation."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)  # rows: q, then k, then v, heads-major
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, softmax: float = 1.0) -> Tensor:
        """x (B, T, D) -> (B, T, D); the logits are multiplied by `softmax`."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, T, d)
        scale = None if softmax == 1.0 else softmax * q.shape[-1] ** -0.5
        return self.proj(attend(q, k, v, scale=scale).transpose(1, 2).flatten(2))
