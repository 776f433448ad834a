"""Checkpoints beside training: a step waits while the state is copied to the host, a thread does the rest."""

import threading
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldit.errors import RunError

_ALIGNED = 64


class Staging:
    """Host memory for copies of the state, one block kept between checkpoints. Copies of one save are overwritten by
    the next: wait for the save before.

    The block is registered with CUDA at its size; torch's own pinned memory rounds every tensor up to a power of two.
    """

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)
        self._registered: weakref.finalize[..., Staging] | None = None
        self._used = 0

    def begin(self, values: Sequence[Tensor]) -> None:
        """Make room for copies of `values`, and forget the last ones."""
        needed = sum(-(-v.numel() * v.element_size() // _ALIGNED) * _ALIGNED for v in values)
        if needed > self._block.numel():
            self._grow(needed, next((v.device for v in values if v.is_cuda), None))
        self._used = 0

    def _grow(self, needed: int, device: torch.device | None) -> None:
        if self._registered is not None:
            self._registered()
        self._block, self._registered = torch.empty(0, dtype=torch.uint8), None  # the old one goes before the new one
        try:
            # The system gives pages when they are first written to, more slowly than they are copied: it is asked here.
            self._block = torch.empty(needed, dtype=torch.uint8).zero_()
        except RuntimeError:
            raise RunError(f"a checkpoint needs {needed:,} bytes of host memory, which cannot be had") from None
        if device is not None:
            with torch.cuda.device(device):  # a thread begins on the first device, whichever the process uses
                if not int(torch.cuda.cudart().cudaHostRegister(self._block.data_ptr(), needed, 0)):
                    self._registered = weakref.finalize(self, _unregister, self._block)
                    self._registered.atexit = False  # CUDA goes before, with all its memory

    def copy(self, value: Tensor) -> Tensor:
        """A host copy of `value`; complete after `settle`."""
        size = value.numel() * value.element_size()
        held = self._block[self._used : self._used + size].view(value.dtype).view(value.shape)
        self._used += -(-size // _ALIGNED) * _ALIGNED
        return held.copy_(value.detach(), non_blocking=True)

    @staticmethod
    def settle() -> None:
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()


def _unregister(block: Tensor) -> None:
    """Memory that is freed and still registered would be taken for registered when it is handed out again."""
    torch.cuda.cudart().cudaHostUnregister(block.data_ptr())


class Saver:
    """Runs one save at a time on a thread; `failed` tells the next step, `wait` raises what went wrong."""

    def __init__(self, beside: bool) -> None:
        self.beside = beside
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def failed(self) -> bool:
        return self._error is not None

    def start(self, work: Callable[[], object]) -> None:
        """Wait for the save before, then run `work` beside the caller, or at once if saves are not asynchronous."""
        self.wait()

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run, name="saver", daemon=True)
        self._thread.start()
        if not self.beside:
            self.wait()

    def settle(self) -> None:
        """Until nothing is being saved, however it ended."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def wait(self) -> None:
        """Until nothing is being saved; raises what the last save raised, once."""
        self.settle()
        error, self._error = self._error, None
        if error is not None:
            raise error
