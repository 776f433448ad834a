"""What follows the backward passes of a step: optimiser, averages, and the network's copy of the weights."""

from collections.abc import Sequence

from torch import Tensor

from ldit.nn.kernels import has_triton
from ldit.training.ema import Averages
from ldit.training.optim import Optimizer
from ldit.training.weights import Weights


class Update:
    """Pass by pass: the optimiser before the host knows whether the step is applied, the rest after."""

    def __init__(self, weights: Weights, averages: Averages, optimizer: Optimizer) -> None:
        self.weights, self.averages, self.optimizer = weights, averages, optimizer

    def queue(
        self, grads: Sequence[Tensor], lr: float, sound: Tensor, number: int, factor: Tensor | None, n: int
    ) -> None:
        """Apply gradients, one for each master, times `factor` (None = 1), if `sound`, a bool on the device, is true.
        `number`: steps before this one. `n`: the number of this update, if it is one."""
        self.averages.settle()
        self.optimizer.step(grads, lr, sound, number, factor)

    def settle(self, n: int) -> None:
        """What is left once the host knows that update `n` was applied."""
        self.averages.update(self.weights.masters, n)
        self.weights.sync_to_model()


def update_for(weights: Weights, averages: Averages, optimizer: Optimizer, eager: bool = False) -> Update:
    """All in one pass on GPUs with Triton, unless `eager`; else pass by pass."""
    if has_triton(weights.device) and not eager:
        from ldit.training.fused_update import FusedUpdate

        return FusedUpdate(weights, averages, optimizer)
    return Update(weights, averages, optimizer)
