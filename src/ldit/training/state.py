"""TrainState: everything that changes during a run."""

import torch

from ldit.config.run import BaseRun
from ldit.parallel.world import World
from ldit.training.ema import Averages
from ldit.training.guard import Guard, Scaler
from ldit.training.optim import Optimizer
from ldit.training.update import update_for
from ldit.training.weights import Weights


class TrainState:
    """Everything that changes during a run: weights, averages, optimiser, and counters."""

    def __init__(self, weights: Weights, config: BaseRun, world: World) -> None:
        self.config, self.world, self.weights = config, world, weights
        self.averages = Averages(config.ema, weights.masters)
        self.optimizer = Optimizer(config.optim, weights, world.model_group)
        self.update = update_for(weights, self.averages, self.optimizer, config.parallel.eager)
        self.scaler = Scaler.of(config.train.precision)
        self.guard = Guard()
        self.step = 0
        """Steps done, including skipped ones."""
        self.updates = 0
        """Steps applied."""
        self.offset = 0
        """Samples skipped by rollbacks: the step after s takes positions offset + s·batch_size …"""
        # Weight of each local part in a sum over all ranks: replicas hold the same gradients, and so do the ranks of a
        # tensor-parallel group where a parameter is not split.
        shares = [1.0 / (world.replicate * layout.copies) for layout in weights.layouts]
        self.shares = torch.tensor(shares, dtype=exact_dtype(world.device), device=world.device)


def exact_dtype(device: torch.device) -> torch.dtype:
    """The dtype for sums of squares and losses: fp64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64
