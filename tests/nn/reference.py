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


def patches(w: dict[str, Tensor], name: str, x: Tensor, p: int) -> tuple[list[Tensor], list[tuple[int, int]]]:
    """Embedded patches of side p in rows, and the row and column of each."""
    tokens, places = [], []
    for row in range(x.shape[1] // p):
        for column in range(x.shape[2] // p):
            patch = x[:, row * p : (row + 1) * p, column * p : (column + 1) * p]
            tokens.append(linear(w, name, patch.reshape(-1)))
            places.append((row, column))
    return tokens, places


def split_in_four(w: dict[str, Tensor], h: Tensor, x: Tensor, p: int) -> Tensor:
    """Tokens of patches of side 2p -> of side p: a quarter of `split` each, GELU, plus the embedded small patch."""
    parts = linear(w, "split", h).chunk(4, dim=-1)
    small, places = patches(w, "fine_embedder", x, p)
    columns = x.shape[2] // (2 * p)
    out = []
    for token, (row, column) in zip(small, places, strict=True):
        part = parts[2 * (row % 2) + column % 2][(row // 2) * columns + column // 2]
        out.append(part * 0.5 * (1 + torch.erf(part / math.sqrt(2))) + token)
    return torch.stack(out)


def image_of(config: Any, w: dict[str, Tensor], head: str, h: Tensor, c: Tensor, x: Tensor, p: int, gap: int) -> Tensor:
    """The image of a head's output tokens; `gap` tokens at the end of each row are no patches."""
    shift, scale = linear(w, f"{head}.adaLN_modulation.1", silu(c)).chunk(2)
    out = linear(w, f"{head}.linear", layer_norm(h, 1e-6) * (1 + scale) + shift)
    channels = config.in_channels * (2 if config.learn_sigma else 1)
    rows, columns = x.shape[1] // p, x.shape[2] // p
    image = torch.empty(channels, rows * p, columns * p, dtype=torch.float64)
    for row in range(rows):
        for column in range(columns):
            token = out[row * (columns + gap) + column]
            for a in range(p):
                for b in range(p):
                    at = (a * p + b) * channels
                    image[:, row * p + a, column * p + b] = token[at : at + channels]
    return image


def forward(
    config: Any,
    w: dict[str, Tensor],
    x: Tensor,
    t: float,
    y: int | None = None,
    text: Tensor | None = None,
    augmentation: Tensor | None = None,
    kept: list[int] | None = None,
    routed: tuple[int, int] = (0, 0),
    mid: bool = False,
) -> Tensor:
    """One image x (C, H, W); y a class, or text (L, F) the features of a caption without padding. `kept`: the image
    tokens that pass through the blocks `routed` = (first, last + 1). With `mid` the second head's image."""
    w = {name: value.double() for name, value in w.items()}
    x = x.double()
    fine, count = getattr(config, "fine_layers", 0), getattr(config, "class_tokens", 0)
    p = config.patch_size * (2 if fine else 1)
    tokens, places = patches(w, "x_embedder", x, p)
    if text is not None:
        columns = x.shape[2] // p
        for row in reversed(range(x.shape[1] // p)):
            tokens.insert((row + 1) * columns, w["eol_token"])
            places.insert((row + 1) * columns, (row, columns))
        while len(tokens) < config.max_seq_len:
            places.append(divmod(len(tokens), columns + 1))
            tokens.append(w["pad_token"])
    h = torch.stack(tokens)
    still = [[0.0] * (config.head_dim // 2)] * count  # class tokens are not turned
    turn = still + [angles(config, i, *place) for i, place in enumerate(places)]
    if count:
        h = torch.cat([w["y_tokens.embedding_table.weight"][y].view(count, -1), h])

    c = time_vector(w, t)
    if text is not None:
        text = text.double()
        mean = layer_norm(text.mean(0), 1e-5) * w["cap_embedder.0.weight"] + w["cap_embedder.0.bias"]
        c = c + linear(w, "cap_embedder.1", mean)
    else:
        c = c + w["y_embedder.embedding_table.weight"][y]
    if augmentation is not None:
        c = c + linear(w, "augment_embedder", augmentation.double())

    heads, kv = config.n_heads, config.n_kv_heads or config.n_heads
    first = aside = second = None
    for i in range(config.n_layers):
        n = f"layers.{i}"
        if fine and i == config.n_layers - fine:
            p, first = config.patch_size, None
            h = torch.cat([h[:count], split_in_four(w, h[count:], x, p)])
            fine_places = [(row, column) for row in range(x.shape[1] // p) for column in range(x.shape[2] // p)]
            turn = still + [angles(config, j, *place) for j, place in enumerate(fine_places)]
        if kept is not None and i == routed[0]:
            way = [*range(count), *(count + j for j in kept)]
            aside, every = h, turn
            h, turn = h[way], [turn[j] for j in way]
        if config.shared_adaln:
            six = linear(w, "adaLN_modulation.1", silu(c)) + w["adaLN_table"][i]
        else:
            six = linear(w, f"{n}.adaLN_modulation.1", silu(c))
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = six.chunk(6)
        a = rms(h, w[f"{n}.attention_norm.weight"], config.norm_eps) * (1 + scale_a) + shift_a
        q = normed(config, w, f"{n}.attention.q_norm", linear(w, f"{n}.attention.wq", a), heads)
        k = normed(config, w, f"{n}.attention.k_norm", linear(w, f"{n}.attention.wk", a), kv)
        v = linear(w, f"{n}.attention.wv", a).view(len(a), kv, -1)
        if config.value_residual:
            first = v if first is None else first
            mix = w[f"{n}.attention.value_mix"]
            v = torch.stack([mix[0, m] * v[:, m] + mix[1, m] * first[:, m] for m in range(kv)], dim=1)
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
        if kept is not None and i + 1 == routed[1]:
            aside = aside.clone()
            for j, token in zip(way, h, strict=True):
                aside[j] = token
            h, turn = aside, every
        if i + 1 == config.mid_layer:
            second = image_of(config, w, "mid_head", h[count:], c, x, p, 0)
    if mid:
        return second
    return image_of(config, w, "final_layer", h[count:], c, x, p, int(text is not None))
