"""InferenceOptions and InferenceCopy: how sampling may call a network, without the code that does it."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from ldit.nn.rope import GridScale

OFFLOADED = "_blocks_on_host"  # attribute of a network that `ldit.sampling.fast.offload` changed


@dataclass(frozen=True)
class InferenceOptions:
    """What is done to the blocks. `packed`: q, k, v in one product and w1, w3 in one; None: on a GPU, which saves
    launches; on a CPU the strided halves cost more than the larger products gain. `int8`: the products of attention
    and FFN in 8 bits, CPU and fp32 alone. `compiled`: torch.compile, block by block. `graph`: an evaluation is a CUDA
    graph, on a GPU alone. `host_modulation`: the adaLN weights live on the host."""

    packed: bool | None = None
    int8: bool = False
    compiled: bool = False
    graph: bool = False
    host_modulation: bool = False


class InferenceCopy(ABC):
    """A network for sampling with the outputs of the one that it was made of (`ldit.sampling.fast.prepare`). It looks
    conditioning up on the host, so times and labels may be there whatever the device."""

    @abstractmethod
    def __call__(self, x: Tensor, time: Tensor, cond: Tensor, *, grid: GridScale | None = None) -> Tensor:
        """As the network."""

    @abstractmethod
    def current(self) -> bool:
        """Whether the model's weights are still those that this computes with."""

    @abstractmethod
    def apart(self) -> "InferenceCopy":
        """The same network for one request, with a plan of its own."""

    @abstractmethod
    def release(self) -> bool:
        """Free what is held for speed alone; whether there was any."""

    @abstractmethod
    def plan(self, pairs: Iterable[tuple[float, int]]) -> None:
        """Tell which (time, label) will be asked for, so that their conditioning is made together."""


def is_offloaded(model: nn.Module) -> bool:
    """Whether a network's blocks stay on the host: it cannot be moved, converted or copied any more."""
    return getattr(model, OFFLOADED, False)
