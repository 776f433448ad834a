"""TrainState: all that changes in a run."""

import torch

from ldit.config.run import BaseRun
from ldit.parallel.world import World
from ldit.train.ema import Averages
from ldit.train.guard import Guard, Scaler
from ldit.train.optim import Optimizer
from ldit.train.weights import Weights


class TrainState:
    """All that changes in a run: weights, averages, optimiser, and a few numbers."""

    def __init__(self, weights: Weights, config: BaseRun, world: World) -> None:
        self.config, self.world, self.weights = config, world, weights
        self.averages = Averages(config.ema, weights.masters)
        self.optimizer = Optimizer(config.optim, weights, world.model_group)
        self.scaler = Scaler.of(config.train.precision)
        self.guard = Guard()
        self.step = 0
        """Steps done, those left out included."""
        self.updates = 0
        """Steps applied."""
        self.offset = 0
        """Samples passed over by rollbacks: step s takes positions offset + s·batch_size …"""
        # What a part adds to the sum over all processes: replicas hold the same gradients, and so do tensor-parallel
        # neighbours of a parameter that is not cut.
        shares = [1.0 / (world.replicate * layout.copies) for layout in weights.layouts]
        self.shares = torch.tensor(shares, dtype=exact_dtype(world.device), device=world.device)


def exact_dtype(device: torch.device) -> torch.dtype:
    """Sums of squares and losses are joined in fp64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64
