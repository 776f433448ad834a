"""Small networks and their inference copies, for tests of both."""

from typing import Any

import torch
from test_variants import TINY, filled
from torch import Tensor

from ldit.config.model import ClassModelConfig
from ldit.nn.dit import DiT
from ldit.sampling.fast.options import InferenceOptions
from ldit.sampling.fast.prepare import Prepared, prepare

TIMES, LABELS = (17.0, 3.5, 999.0), (4, 0, 5)


def tiny(**changes: Any) -> DiT:
    return filled(ClassModelConfig(**{**TINY, "input_size": 8, "num_classes": 5, **changes}))


def prepared(model: DiT, **inference: Any) -> Prepared:
    network = prepare(model, InferenceOptions(**inference))
    assert isinstance(network, Prepared)
    return network


def batch(model: DiT, rows: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    config = model.config
    assert isinstance(config, ClassModelConfig)
    labels = torch.tensor(LABELS).clamp(max=model.y_embedder.embedding_table.num_embeddings - 1)
    x = torch.randn(rows, config.in_channels, 8, 8, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor(TIMES)[torch.arange(rows) % 3], labels[torch.arange(rows) % 3]


def error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()
