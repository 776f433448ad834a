"""Golden cases: inputs, weights and outputs computed by the original itself, and how they are compared."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ldit.config.model import ModelConfig, model_from_dict
from ldit.config.spec import AutoencoderConfig, DDPMConfig, ModelSpec
from ldit.nn.build import build_model
from ldit.nn.conditioning import TextCondition

FOLDER = Path(__file__).resolve().parent.parent / "golden"
TOLERANCE = 5e-6  # fp32: about 40 roundings deep, relative to the largest value


@dataclass(frozen=True)
class Golden:
    name: str
    seed: int
    keys: dict[str, list[int]]
    config: ModelConfig
    io: dict[str, Tensor]
    model: nn.Module

    @property
    def spec(self) -> ModelSpec:
        return ModelSpec(self.config, DDPMConfig(), AutoencoderConfig())

    @property
    def cond(self) -> Tensor | TextCondition:
        if "in.y" in self.io:
            return self.io["in.y"]
        return TextCondition(self.io["in.cap_feats"], self.io["in.cap_mask"])


def golden(name: str) -> Golden:
    data = json.loads((FOLDER / f"{name}.json").read_text())
    kind = {"class": "class", "text": "text", "dit": "dit"}[name.split("_")[0]]
    config = model_from_dict({"kind": kind, **data["config"]})
    model = build_model(config)
    model.load_state_dict(load_file(FOLDER / f"{name}.weights.safetensors"))
    io = load_file(FOLDER / f"{name}.io.safetensors")
    return Golden(name, data["seed"], data["keys"], config, io, model.eval().requires_grad_(False))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    """Largest difference relative to the largest expected value."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert error <= tolerance, f"relative error {error:.2e}"


def doubled_noise(seed: int, shape: tuple[int, ...], steps: int) -> tuple[Tensor, list[Tensor]]:
    """The original's random numbers: z, then a draw for the doubled state at each step; its first half counts."""
    generator = torch.Generator().manual_seed(seed + 7)
    z = torch.randn(shape, generator=generator)
    doubled = (2 * shape[0], *shape[1:])
    return z, [torch.randn(doubled, generator=generator)[: shape[0]] for _ in range(steps)]
