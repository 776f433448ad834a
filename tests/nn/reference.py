"""A second implementation of the network, in float64 and loops, written from the architecture's description alone.

It takes a state dict and a configuration and knows nothing of ldit.nn. Slow on purpose: one image, one head, one
token at a time wherever that keeps it plain.
"""

import math
from typing import Any

import torch
from torch import Tensor


def linear(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def layer_norm(x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def time_vector(w: dict[str, Tensor], t: float) -> Tensor:
    features = [math.cos(t * 10000 ** (-i / 128)) for i in range(128)]
    features += [math.sin(t * 10000 ** (-i / 128)) for i in range(128)]
    x = torch.tensor(features, dtype=torch.float64)
    return linear(w, "t_embedder.mlp.2", silu(linear(w, "t_embedder.mlp.0", x)))


def rotate(x: Tensor, pairs: list[float]) -> Tensor:
    """One head of one token by the angle of each adjacent pair."""
    out = x.clone()
    for i, angle in enumerate(pairs):
        a, b = x[2 * i], x[2 * i + 1]
        out[2 * i] = a * math.cos(angle) - b * math.sin(angle)
        out[2 * i + 1] = a * math.sin(angle) + b * math.cos(angle)
    return out


def angles(config: Any, position: int, row: int, column: int) -> list[float]:
    d = config.head_dim
    scale = getattr(config, "rope_scaling_factor", 1.0)
    if config.rope == "raster":
        return [position / scale * 10000 ** (-2 * i / d) for i in range(d // 2)]
    quarter = [10000 ** (-4 * i / d) for i in range(d // 4)]
    return [row / scale * f for f in quarter] + [column / scale * f for f in quarter]


def normed(config: Any, w: dict[str, Tensor], name: str, x: Tensor, heads: int) -> Tensor:
    """Projected queries or keys (T, heads·d) -> (T, heads, d), normalised as configured."""
    split = x.view(len(x), heads, config.head_dim)
    if config.qk_norm == "head":
        return rms(split, w[f"{name}.weight"], 1e-5)
    if config.qk_norm:
        return (layer_norm(x, 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]).view_as(split)
    return split


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """q (T, H, d), k and v (L, G, d), H/G query heads share a key head -> (T, H, d)."""
    out = torch.empty_like(q)
    for head in range(q.shape[1]):
        shared = head // (q.shape[1] // k.shape[1])
        score = q[:, head] @ k[:, shared].T / math.sqrt(q.shape[2])
        if mask is not None:
            score = score.masked_fill(~mask[None], -math.inf)
        out[:, head] = score.softmax(-1) @ v[:, shared]
    return out


def forward(
    config: Any, w: dict[str, Tensor], x: Tensor, t: float, y: int | None = None, text: Tensor | None = None
) -> Tensor:
    """One image x (C, H, W); y a class, or text (L, F) the features of a caption without padding."""
    w = {name: value.double() for name, value in w.items()}
    x = x.double()
    p, rows, columns = config.patch_size, x.shape[1] // config.patch_size, x.shape[2] // config.patch_size
    tokens, places = [], []
    for row in range(rows):
        for column in range(columns):
            patch = x[:, row * p : (row + 1) * p, column * p : (column + 1) * p]
            tokens.append(linear(w, "x_embedder", patch.reshape(-1)))
            places.append((row, column))
        if text is not None:
            tokens.append(w["eol_token"])
            places.append((row, columns))
    if text is not None:
        while len(tokens) < config.max_seq_len:
            places.append(divmod(len(tokens), columns + 1))
            tokens.append(w["pad_token"])
    h = torch.stack(tokens)
    turn = [angles(config, i, *place) for i, place in enumerate(places)]

    c = time_vector(w, t)
    if text is not None:
        text = text.double()
        mean = layer_norm(text.mean(0), 1e-5) * w["cap_embedder.0.weight"] + w["cap_embedder.0.bias"]
        c = c + linear(w, "cap_embedder.1", mean)
    else:
        c = c + w["y_embedder.embedding_table.weight"][y]

    heads, kv = config.n_heads, config.n_kv_heads or config.n_heads
    for i in range(config.n_layers):
        n = f"layers.{i}"
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = linear(w, f"{n}.adaLN_modulation.1", silu(c)).chunk(6)
        a = rms(h, w[f"{n}.attention_norm.weight"], config.norm_eps) * (1 + scale_a) + shift_a
        q = normed(config, w, f"{n}.attention.q_norm", linear(w, f"{n}.attention.wq", a), heads)
        k = normed(config, w, f"{n}.attention.k_norm", linear(w, f"{n}.attention.wk", a), kv)
        v = linear(w, f"{n}.attention.wv", a).view(len(a), kv, -1)
        q = torch.stack([torch.stack([rotate(q[j, m], turn[j]) for m in range(heads)]) for j in range(len(q))])
        k = torch.stack([torch.stack([rotate(k[j, m], turn[j]) for m in range(kv)]) for j in range(len(k))])
        mixed = attend(q, k, v)
        if text is not None:
            z = rms(text, w[f"{n}.attention_y_norm.weight"], config.norm_eps)
            k_y = normed(config, w, f"{n}.attention.ky_norm", linear(w, f"{n}.attention.wk_y", z), kv)
            v_y = linear(w, f"{n}.attention.wv_y", z).view(len(z), kv, -1)
            mixed = mixed + attend(q, k_y, v_y) * w[f"{n}.attention.gate"].tanh()[None, :, None]
        h = h + gate_a * linear(w, f"{n}.attention.wo", mixed.reshape(len(h), -1))
        f = rms(h, w[f"{n}.ffn_norm.weight"], config.norm_eps) * (1 + scale_m) + shift_m
        inner = silu(linear(w, f"{n}.feed_forward.w1", f)) * linear(w, f"{n}.feed_forward.w3", f)
        h = h + gate_m * linear(w, f"{n}.feed_forward.w2", inner)

    shift, scale = linear(w, "final_layer.adaLN_modulation.1", silu(c)).chunk(2)
    out = linear(w, "final_layer.linear", layer_norm(h, 1e-6) * (1 + scale) + shift)
    channels = config.in_channels * (2 if config.learn_sigma else 1)
    image = torch.empty(channels, rows * p, columns * p, dtype=torch.float64)
    for row in range(rows):
        for column in range(columns):
            token = out[row * (columns + (text is not None)) + column]
            for a in range(p):
                for b in range(p):
                    at = (a * p + b) * channels
                    image[:, row * p + a, column * p + b] = token[at : at + channels]
    return image
