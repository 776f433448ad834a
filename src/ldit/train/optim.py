"""Optimiser and learning-rate schedule."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ldit.config.sections import OptimConfig, TrainConfig

FINAL_SHARE = 0.01  # of the peak learning rate, at the end of a cosine


def build_optimizer(config: OptimConfig, parameters: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
    """AdamW, fused."""
    return torch.optim.AdamW(
        parameters, lr=lr, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay, fused=True
    )


def learning_rate(config: TrainConfig, step: int) -> float:
    """Rate of step 1 … config.steps: linear warm-up, then constant or cosine, then the linear cooldown."""
    if step <= config.warmup:
        return config.lr * step / config.warmup
    if config.cooldown and step > config.steps - config.cooldown:
        return config.lr * (config.steps - step + 1) / (config.cooldown + 1)
    if config.schedule == "constant":
        return config.lr
    share = (step - config.warmup) / max(config.steps - config.warmup, 1)
    return config.lr * (FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0))))
