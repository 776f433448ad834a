"""The Inception network's golden case: weights made from their names, as the reference makes them."""

import json
import zlib
from functools import cache

import numpy as np
import torch
from golden import FOLDER
from safetensors.torch import load_file
from torch import Tensor

IMAGES = ("s64", "smooth256")
TOLERANCE = 1e-5  # fp32 through 20 to 60 convolutions, relative to the largest value; the golden file is 3e-6 off fp64


@cache
def weights() -> dict[str, Tensor]:
    """566 entries."""
    data = json.loads((FOLDER / "inception.json").read_text())
    return {name: _made(name, shape, data["seed"]) for name, shape in data["keys"].items()}


def _made(name: str, shape: list[int], seed: int) -> Tensor:
    if name.endswith("num_batches_tracked"):
        return torch.tensor(0)
    source = np.random.Generator(np.random.Philox(key=seed * 1_000_003 + zlib.crc32(name.encode())))
    a = source.standard_normal(shape, dtype=np.float32)
    if name.endswith("running_var"):
        return torch.from_numpy(np.float32(0.5) + np.abs(a))
    if name.endswith("bn.weight"):
        return torch.from_numpy(1 + np.float32(0.1) * a)
    if len(shape) > 1:
        return torch.from_numpy(a * np.float32(1.4 / np.sqrt(np.prod(shape[1:]))))
    return torch.from_numpy(np.float32(0.1) * a)


def without_counts() -> dict[str, Tensor]:
    """472 entries, as older files have."""
    return {name: tensor for name, tensor in weights().items() if not name.endswith("num_batches_tracked")}


@cache
def io() -> dict[str, Tensor]:
    """CASE.x uint8 (2, 3, S, S); CASE.pool, CASE.spatial, CASE.logits_unbiased."""
    return load_file(FOLDER / "inception.io.safetensors")
