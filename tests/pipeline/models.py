"""Pipelines of a few kilobytes with random weights."""

from dataclasses import replace
from typing import Any

import torch

from ldit.config.model import ClassModelConfig
from ldit.config.spec import ClassConditionerConfig, DDPMConfig, FlowConfig, ModelSpec, PixelCodecConfig, SamplingConfig
from ldit.nn.build import build_model
from ldit.pipeline.load import Pipeline
from ldit.sampling.fast.options import InferenceOptions

MODEL = ClassModelConfig(
    dim=32, n_layers=1, n_heads=2, multiple_of=16, input_size=8, in_channels=3, num_classes=4, qk_norm=True
)
NAMES = ("ant", "bee", "cat", "dog")


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Within the rounding of a few steps in fp32: 1e-5 of the largest value. Other batch shapes take other kernels, and
    so do weights mapped from a file, which are aligned otherwise."""
    return a.shape == b.shape and ((a - b).abs().max() <= 1e-5 * b.abs().max()).item() is True


def tiny(model: ClassModelConfig = MODEL, weights: int = 0, **changes: Any) -> Pipeline:
    """DDPM over pixels; `weights` is the seed they are drawn from."""
    network = build_model(model)
    drawn = torch.Generator().manual_seed(weights)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn(p.shape, generator=drawn) * 0.1 + (1.0 if p.ndim == 1 else 0.0))
    parts: dict[str, Any] = {
        "process": DDPMConfig(),
        "codec": PixelCodecConfig(),
        "conditioner": ClassConditionerConfig(NAMES if model.num_classes == 4 else None),
        "sampling": SamplingConfig("ddpm", 5, 2.0),
    }
    spec = ModelSpec(model=model, **{**parts, **changes})
    return Pipeline(
        network.eval().requires_grad_(False), spec, inference=InferenceOptions()
    )  # as `ldit.load` makes them


def tiny_flow(weights: int = 0, **changes: Any) -> Pipeline:
    """The same as a flow, of `model` if given."""
    model = changes.pop("model", replace(MODEL, learn_sigma=False))
    parts: dict[str, Any] = {"process": FlowConfig(), "sampling": SamplingConfig("heun", 4, 2.0)}
    return tiny(model, weights, **{**parts, **changes})
