"""Checks of the user's objects, an objective and a network: one line for what would fail or be wrong later."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ldit.config.experiment import name_of
from ldit.config.model import ModelConfig
from ldit.config.recipes.registry import place_of
from ldit.diffusion.process import Prediction, Process
from ldit.errors import ConfigError
from ldit.training.step import RESERVED, RESERVED_PREFIXES

NetworkBuilder = Callable[[ModelConfig], nn.Module]
"""Builds a network from `model`, called as network(x, t, y): x (B, C, H, W), t (B,), y (B,) -> (B, C or 2C, H, W)."""


def check_process(objective: Any) -> None:
    """ConfigError for an objective that is no `ldit.diffusion.process.Process`."""
    if isinstance(objective, type):
        raise ConfigError(f"objective: give an object, {objective.__name__}(), not the class {name_of(objective)}")
    lacking = [name for name in vars(Process) if not name.startswith("_") and not hasattr(objective, name)]
    if lacking:
        raise ConfigError(
            f"objective: {name_of(type(objective))} has no {', '.join(lacking)}; subclass ldit.diffusion.Flow or DDPM"
        )


def check_network(network: NetworkBuilder, config: ModelConfig) -> None:
    """ConfigError for a builder whose network cannot be trained."""
    try:
        with torch.device("meta"):
            built = network(config)
    except RuntimeError as error:
        words = f"{' '.join(str(error).split())}{place_of(error)}"
        raise ConfigError(f"network: {name_of(network)} cannot be built on the meta device: {words}") from error
    if not isinstance(built, nn.Module):
        raise ConfigError(f"network: {name_of(network)} must return a torch.nn.Module, got a {type(built).__name__}")
    buffers = [name for name, _ in built.named_buffers()]
    if buffers:  # nothing would fill them: they are built without memory, and not saved
        raise ConfigError(f"network: {name_of(network)} has the buffer {buffers[0]}; compute constants in forward")


def check_losses(losses: Any, count: int, objective: Process) -> None:
    """ConfigError for what a user's objective must not return."""
    where = f"objective: {name_of(type(objective))}.losses()"
    if not isinstance(losses, dict) or "loss" not in losses:
        got = sorted(losses) if isinstance(losses, dict) else type(losses).__name__
        raise ConfigError(f"{where} must return a dict with 'loss', got {got}")
    for name, value in losses.items():
        if name in RESERVED or name.startswith(RESERVED_PREFIXES):
            raise ConfigError(f"{where}: the name {name!r} is taken by metrics.jsonl; choose another")
        if not isinstance(value, Tensor) or tuple(value.shape) != (count,):
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ConfigError(f"{where}: {name!r} must be a tensor of shape ({count},), a value a sample, got {shape}")
    if torch.is_grad_enabled() and not losses["loss"].requires_grad:
        raise ConfigError(f"{where}: 'loss' does not depend on the network's output")


def check_output(prediction: Tensor | Prediction, x: Tensor) -> None:
    """ConfigError for an output, alone or in a Prediction, that is not (B, C or 2C, H, W) for x (B, C, H, W)."""
    out = prediction.out if isinstance(prediction, Prediction) else prediction
    batch, channels, *sides = x.shape
    if not isinstance(out, Tensor) or tuple(out.shape) not in [(batch, n * channels, *sides) for n in (1, 2)]:
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ConfigError(
            f"network: its output must be (B, C, H, W) or (B, 2C, H, W) for x {tuple(x.shape)}, got {got}"
        )
