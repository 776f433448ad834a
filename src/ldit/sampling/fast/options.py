"""InferenceOptions and InferenceCopy: the options and the interface of `ldit.sampling.fast.prepare`."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from ldit.nn.rope import GridScale

OFFLOADED = "_blocks_on_host"  # attribute of a network that `ldit.sampling.fast.offload` changed


@dataclass(frozen=True)
class InferenceOptions:
    """What is done to a network for sampling."""

    packed: bool | None = None
    """q, k, v in one product, and w1, w3 in one. None: on a GPU only, where it saves launches; on a CPU the strided
    halves cost more than the larger products gain."""
    int8: bool = False
    """Matrix products of attention and FFN in 8 bits; for fp32 on a CPU."""
    compiled: bool = False
    """torch.compile, block by block."""
    graph: bool | None = None
    """An evaluation is a CUDA graph. None: on a GPU."""
    host_modulation: bool = False
    """The adaLN weights stay on the host."""


class InferenceCopy(ABC):
    """A copy of a network for sampling, with the same outputs (`ldit.sampling.fast.prepare`).

    It looks up its conditioning on the host, so times and labels may be there whatever the device.
    """

    @abstractmethod
    def __call__(
        self, x: Tensor, time: Tensor, cond: Tensor, *, grid: GridScale | None = None, mid: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The output of the network; with `mid` that of its second head besides."""

    @abstractmethod
    def is_current(self) -> bool:
        """Whether the model still has the weights that this copy computes with."""

    @abstractmethod
    def for_request(self) -> "InferenceCopy":
        """A copy for one request: it shares the weights and has its own plan."""

    @abstractmethod
    def release(self) -> bool:
        """Free memory that is held only for speed; whether there was any."""

    @abstractmethod
    def plan(self, pairs: Iterable[tuple[float, int]]) -> None:
        """Announce the (time, label) that will be asked for, so that their conditioning is computed together."""


def is_offloaded(model: nn.Module) -> bool:
    """Whether a network's blocks are streamed from the host: then it cannot be moved, converted or copied."""
    return getattr(model, OFFLOADED, False)
