"""Builds a network from a configuration, and counts its parameters and FLOPs.

Counting builds the network on the meta device, which takes milliseconds and no memory.
"""

from dataclasses import asdict

import torch
from torch import nn

from ldit.config.model import ModelConfig, OriginalDiTConfig, TextModelConfig
from ldit.nn.conditioning import FEATURES
from ldit.nn.dit import DiT


def build_model(config: ModelConfig, device: torch.device | str | None = None) -> nn.Module:
    """The network of `config` on `device`. Its parameters are not initialised; see `ldit.nn.dit.init_weights`."""
    with torch.device(device or "cpu"):
        if isinstance(config, OriginalDiTConfig):
            arguments = asdict(config)
            del arguments["kind"]
            from ldit.nn.dit_original import OriginalDiT

            return OriginalDiT(**arguments)
        return DiT(config)


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every entry of the state dict, in the order of the state dict."""
    return {name: tuple(p.shape) for name, p in build_model(config, "meta").state_dict().items()}


def parameter_count(config: ModelConfig) -> int:
    """Number of parameters, fixed ones included."""
    return sum(p.numel() for p in build_model(config, "meta").parameters())


def forward_flops(config: ModelConfig, height: int, width: int, text_tokens: int = 128) -> int:
    """FLOPs of one forward pass of one image of latent size height x width: matrix products only, 1 MAC = 2 FLOPs; of
    two output heads only the last is counted.

    Attention counts 2·T²·D MACs (scores and values). A training step without recomputation costs three times this.
    """
    # Below everything is counted in MACs; the factor 2 comes at the return.
    p = config.patch_size
    tokens = (height // p) * (width // p)
    # The original DiT: full-width attention, a two-layer MLP, and adaLN whose conditioning is as wide as the tokens.
    if isinstance(config, OriginalDiTConfig):
        dim, hidden = config.hidden_size, round(config.hidden_size * config.mlp_ratio)
        block = tokens * (4 * dim * dim + 2 * dim * hidden) + 2 * tokens * tokens * dim + 6 * dim * dim
        ends = tokens * p * p * dim * (config.in_channels + config.out_channels) + 2 * dim * dim
        return 2 * (config.depth * block + ends + dim * (FEATURES + dim))
    # Large-DiT. Once an image: the embedders of time and text.
    dim, cond, kv = config.dim, config.cond_dim, config.kv_heads * config.head_dim
    conditioning = cond * (FEATURES + cond)
    front = fine = 0
    if isinstance(config, TextModelConfig):
        tokens = config.max_seq_len  # the sequence is padded to its full length
        conditioning += cond * config.cap_feat_dim
    else:
        front, fine = config.class_tokens, config.fine_layers
    # Tokens and blocks of each patch level. A trunk of larger patches has a quarter of the tokens.
    levels = [(tokens // 4, config.n_layers - fine), (tokens, fine)] if fine else [(tokens, config.n_layers)]
    blocks = 0
    for length, count in levels:
        # Projections and SwiGLU of every token, then attention.
        length += front
        block = length * (2 * dim * dim + 2 * dim * kv + 3 * dim * config.ffn_hidden) + 2 * length * length * dim
        # Text models add keys and values of the text, and attention to them.
        if isinstance(config, TextModelConfig):
            block += text_tokens * 2 * config.cap_feat_dim * kv + 2 * length * text_tokens * dim
        blocks += count * block
    # adaLN of every block, or once; and of the final layer.
    modulation = 6 * dim * cond * (1 if config.shared_adaln else config.n_layers) + 2 * dim * cond
    # Patch embedding (of both levels, and the split between them) and final layer.
    channels = config.in_channels + config.cond_channels
    ends = tokens * p * p * dim * ((2 if fine else 1) * channels + config.out_channels)
    ends += tokens // 4 * 4 * dim * dim if fine else 0
    return 2 * (blocks + modulation + ends + conditioning)
