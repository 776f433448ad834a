"""facebookresearch/DiT checkpoints: a bare state dict, or {model, ema, opt, args} as its train.py writes them."""

import math
import re
from pathlib import Path

from torch import Tensor

from ldit.checkpoint.pickled import load_pickled
from ldit.config.imagenet import imagenet_names
from ldit.config.model import BASELINE_HEADS, BaselineConfig
from ldit.config.spec import AutoencoderConfig, ClassConditionerConfig, DDPMConfig, ModelSpec
from ldit.errors import ConfigError, SourceError


def read_state(path: Path, ema: bool, check: bool = True) -> dict[str, Tensor]:
    """The state dict asked for, memory-mapped; `check` as in `load_pickled`."""
    data = load_pickled(path, check)
    if not isinstance(data, dict):
        raise SourceError(f"{path} holds a {type(data).__name__}, expected a state dict")
    if "model" in data or "ema" in data:
        key = "ema" if ema and "ema" in data else "model"
        data = data.get(key)
    if not isinstance(data, dict) or not all(isinstance(v, Tensor) for v in data.values()):
        raise SourceError(f"{path} is not a state dict of tensors")
    if "pos_embed" not in data or "x_embedder.proj.weight" not in data:
        raise SourceError(f"{path} is not a DiT checkpoint: it has no pos_embed and x_embedder.proj")
    return data


def spec_from_shapes(path: Path, shapes: dict[str, tuple[int, ...]], heads: int | None) -> ModelSpec:
    """The spec read off the shapes; heads come from the S/B/L/XL table unless given."""
    try:
        width, channels, patch, _ = shapes["x_embedder.proj.weight"]
        depth = 1 + max(int(m[1]) for name in shapes if (m := re.match(r"blocks\.(\d+)\.", name)))
        tokens = shapes["pos_embed"][1]
        rows = shapes["y_embedder.embedding_table.weight"][0]
        hidden = shapes["blocks.0.mlp.fc1.weight"][0]
        out = shapes["final_layer.linear.weight"][0] // (patch * patch)
    except (KeyError, ValueError) as error:
        raise SourceError(f"{path} is not a DiT checkpoint: {error}") from None
    heads = heads or BASELINE_HEADS.get((width, depth))
    if heads is None:
        raise SourceError(
            f"{path}: heads cannot be read from a model of width {width} and depth {depth}; give --heads N"
        )
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise SourceError(f"{path}: {tokens} positions are not a square")
    try:
        model = BaselineConfig(
            input_size=side * patch,
            patch_size=patch,
            in_channels=channels,
            hidden_size=width,
            depth=depth,
            num_heads=heads,
            mlp_ratio=hidden / width,
            num_classes=rows - 1,
            learn_sigma=out == 2 * channels,
        )
    except ConfigError as error:
        raise SourceError(f"{path}: {error}") from None
    names = imagenet_names() if model.num_classes == 1000 else None
    return ModelSpec(model, DDPMConfig(), AutoencoderConfig("stabilityai/sd-vae-ft-mse"), ClassConditionerConfig(names))
