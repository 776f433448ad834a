"""Checks of the user's objects, an objective and a network: one line for what would fail or be wrong later."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ldit.config.model import ClassModelConfig
from ldit.config.recipes.registry import place_of
from ldit.diffusion.process import Process
from ldit.errors import ConfigError
from ldit.training.step import RESERVED

NetworkBuilder = Callable[[ClassModelConfig], nn.Module]
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


def check_network(network: NetworkBuilder, config: ClassModelConfig) -> None:
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
        if name in RESERVED:
            raise ConfigError(f"{where}: the name {name!r} is taken by metrics.jsonl; choose another")
        if not isinstance(value, Tensor) or tuple(value.shape) != (count,):
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ConfigError(f"{where}: {name!r} must be a tensor of shape ({count},), a value a sample, got {shape}")
    if torch.is_grad_enabled() and not losses["loss"].requires_grad:
        raise ConfigError(f"{where}: 'loss' does not depend on the network's output")


def check_output(out: Tensor, x: Tensor) -> None:
    """ConfigError for an output that is not (B, C or 2C, H, W) for x (B, C, H, W)."""
    channels = x.shape[1]
    if out.shape[1] not in (channels, 2 * channels) or out.shape[::2] != x.shape[::2] or out.shape[3:] != x.shape[3:]:
        raise ConfigError(
            f"network: its output must be (B, C, H, W) or (B, 2C, H, W) for x {tuple(x.shape)}, got {tuple(out.shape)}"
        )


def is_of_package(item: Any) -> bool:
    """Whether a class or function is defined in ldit."""
    return str(item.__module__).split(".")[0] == "ldit"


def name_of(item: Any) -> str:
    """The name of a class or function with its module's."""
    return f"{item.__module__}.{item.__qualname__}"
