"""Sizes of networks by name."""

from typing import Any

from ldit.config.model import ClassModelConfig, OriginalDiTConfig, TextModelConfig
from ldit.errors import ConfigError

# name: (dim, n_layers, n_heads). The first three are the original's registered sizes, the others are ours.
PRESETS: dict[str, dict[str, int]] = {
    "DiT_Llama_600M_patch2": {"dim": 1536, "n_layers": 16, "n_heads": 32},
    "DiT_Llama_3B_patch2": {"dim": 3072, "n_layers": 32, "n_heads": 32},
    "DiT_Llama_7B_patch2": {"dim": 4096, "n_layers": 32, "n_heads": 32},
    "XS": {"dim": 256, "n_layers": 6, "n_heads": 4},
    "S": {"dim": 384, "n_layers": 12, "n_heads": 6},
    "B": {"dim": 768, "n_layers": 12, "n_heads": 12},
    "L": {"dim": 1024, "n_layers": 24, "n_heads": 16},
}

# Sizes of the original DiT, also SiT's: (hidden_size, depth, num_heads).
ORIGINAL_DIT: dict[str, tuple[int, int, int]] = {
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}
ORIGINAL_DIT_HEADS = {(width, depth): heads for width, depth, heads in ORIGINAL_DIT.values()}
"""Number of heads by (hidden_size, depth), because checkpoints of the original DiT do not store it."""


def preset(name: str, **changes: Any) -> ClassModelConfig:
    """A class-conditional configuration by preset name, with changes."""
    if name not in PRESETS:
        raise ConfigError(f"unknown model {name!r} (known: {', '.join(PRESETS)})")
    return ClassModelConfig(**{**PRESETS[name], **changes})


def original_dit(name: str, **changes: Any) -> OriginalDiTConfig:
    """A configuration of the original DiT by size (S, B, L, XL), with changes."""
    width, depth, heads = ORIGINAL_DIT[name]
    return OriginalDiTConfig(**{"hidden_size": width, "depth": depth, "num_heads": heads, **changes})


def text_preset(name: str, **changes: Any) -> TextModelConfig:
    """A text-conditional configuration by preset name, with changes."""
    if name not in PRESETS:
        raise ConfigError(f"unknown model {name!r} (known: {', '.join(PRESETS)})")
    return TextModelConfig(**{**PRESETS[name], **changes})
