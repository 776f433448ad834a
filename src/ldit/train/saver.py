"""Checkpoints beside training: a step waits while the state is copied to the host, a thread does the rest."""

import threading
from collections.abc import Callable

import torch
from torch import Tensor


class Staging:
    """Host memory for copies of the state, kept between checkpoints; pinned where the state is on a GPU."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def copy(self, key: str, value: Tensor) -> Tensor:
        """A host copy of `value`; complete after `settle`."""
        held = self._held.get(key)
        if held is None or held.shape != value.shape:
            held = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            self._held[key] = held
        return held.copy_(value.detach(), non_blocking=True)

    @staticmethod
    def settle() -> None:
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()


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

    def wait(self) -> None:
        """Until nothing is being saved; raises what the last save raised, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
