"""Sizes of networks by name."""

from typing import Any

from ldit.config.model import ClassModelConfig, TextModelConfig
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

# Number of heads of the original DiT by (hidden_size, depth), because its checkpoints do not store it.
ORIGINAL_DIT_HEADS: dict[tuple[int, int], int] = {(384, 12): 6, (768, 12): 12, (1024, 24): 16, (1152, 28): 16}


def preset(name: str, **changes: Any) -> ClassModelConfig:
    """A class-conditional configuration by preset name, with changes."""
    if name not in PRESETS:
        raise ConfigError(f"unknown model {name!r} (known: {', '.join(PRESETS)})")
    return ClassModelConfig(**{**PRESETS[name], **changes})


def text_preset(name: str, **changes: Any) -> TextModelConfig:
    """A text-conditional configuration by preset name, with changes."""
    if name not in PRESETS:
        raise ConfigError(f"unknown model {name!r} (known: {', '.join(PRESETS)})")
    return TextModelConfig(**{**PRESETS[name], **changes})
