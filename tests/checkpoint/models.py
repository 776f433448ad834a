"""Models of a few kilobytes, their weights, and the settings that training left beside the original's."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ldit.config.model import ModelConfig
from ldit.config.spec import ModelSpec
from ldit.nn.build import parameter_shapes

SIZES = {"dim": 64, "n_layers": 2, "n_heads": 4, "multiple_of": 32}
TABLE = "y_embedder.embedding_table.weight"

# What its train.py leaves in the Namespace beside the model's own settings.
TRAINING = {
    "data_path": "/data/imagenet",
    "results_dir": "results",
    "image_size": 256,
    "num_classes": 1000,
    "global_batch_size": 256,
    "lr": 1e-4,
    "vae": "ema",
    "precision": "bf16",
    "grad_precision": None,
    "local_diffusers_model_root": None,
    "no_auto_resume": False,
    "qk_norm": True,
}


@dataclass(frozen=True)
class Tiny:
    """A model of a few hundred kilobytes: its spec, and two different sets of weights."""

    spec: ModelSpec
    raw: dict[str, Tensor]
    ema: dict[str, Tensor]


def weights_of(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """Random weights of every parameter."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in parameter_shapes(config).items()}
