"""Asynchronous checkpoints: training waits while the state is copied to the host, a thread writes the copy."""

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldit.errors import RunError
from ldit.training.background import Background

_ALIGNED = 64


class Staging:
    """Host memory for copies of the state: one block, kept between checkpoints. A save overwrites the copies of the one
    before, so wait for that first.

    The block is registered with CUDA as it is: torch's own pinned memory rounds every tensor up to a power of two.
    """

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)
        self._registered: weakref.finalize[..., Staging] | None = None
        self._used = 0

    def begin(self, values: Sequence[Tensor]) -> None:
        """Make room for copies of `values`; earlier copies become invalid."""
        needed = sum(-(-v.numel() * v.element_size() // _ALIGNED) * _ALIGNED for v in values)
        if needed > self._block.numel():
            self._grow(needed, next((v.device for v in values if v.is_cuda), None))
        self._used = 0

    def _grow(self, needed: int, device: torch.device | None) -> None:
        if self._registered is not None:
            self._registered()
        self._block, self._registered = torch.empty(0, dtype=torch.uint8), None  # free the old block first
        try:
            # Writing zeros makes the system map the pages now: mapping them takes longer than the copy itself.
            self._block = torch.empty(needed, dtype=torch.uint8).zero_()
        except RuntimeError:
            raise RunError(f"a checkpoint needs {needed:,} bytes of host memory; there is not enough") from None
        if device is not None:
            with torch.cuda.device(device):  # a new thread starts on device 0, not on the process's
                if not int(torch.cuda.cudart().cudaHostRegister(self._block.data_ptr(), needed, 0)):
                    self._registered = weakref.finalize(self, _unregister, self._block)
                    self._registered.atexit = False  # CUDA shuts down earlier and releases everything

    def copy(self, value: Tensor) -> Tensor:
        """A host copy of `value`, complete after `settle`."""
        size = value.numel() * value.element_size()
        copy = self._block[self._used : self._used + size].view(value.dtype).view(value.shape)
        self._used += -(-size // _ALIGNED) * _ALIGNED
        return copy.copy_(value.detach(), non_blocking=True)

    @staticmethod
    def settle() -> None:
        """Wait until all copies are complete."""
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()


def _unregister(block: Tensor) -> None:
    """Unregister a block before it is freed: CUDA would treat memory reused at its address as still pinned."""
    torch.cuda.cudart().cudaHostUnregister(block.data_ptr())


class Saver(Background):
    """Runs one save at a time. With `asynchronous` false, `start` returns when the save is done."""

    def __init__(self, asynchronous: bool) -> None:
        super().__init__("saver")
        self.asynchronous = asynchronous

    def start(self, work: Callable[[], object]) -> None:
        """Wait for the previous save, then run `work` on the thread."""
        super().start(work)
        if not self.asynchronous:
            self.wait()
