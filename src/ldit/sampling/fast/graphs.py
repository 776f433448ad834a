"""Runs an evaluation of a network as a CUDA graph: one launch instead of hundreds."""

import logging
import threading
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ldit.sampling.fast.oom import out_of_memory

Body = Callable[..., Tensor]
Key = tuple[str | torch.Size, ...]
MOST = 8  # graphs that are kept; each holds the memory of its activations


class Captured(NamedTuple):
    """A captured graph: `replay` computes `out` from the contents of `inputs`."""

    replay: Callable[[], None]
    inputs: tuple[Tensor, ...]
    out: Tensor


def on_cuda(body: Body, inputs: tuple[Tensor, ...]) -> Captured:
    """Capture `body` as a CUDA graph over these tensors. Only one capture at a time may run in a process."""
    # Run it twice on a side stream, as torch asks for: kernels are chosen and libraries opened before the capture.
    current = torch.cuda.current_stream()
    side = torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(2):
            body(*inputs)
    current.wait_stream(side)
    # Capture.
    graph = torch.cuda.CUDAGraph()
    try:
        # "thread_local": other threads may allocate meanwhile, for example to decode.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            out = body(*inputs)
    finally:
        torch.cuda.set_stream(current)  # after a failed capture torch leaves the capture's stream set
    return Captured(graph.replay, inputs, out)


class Graphs:
    """Evaluations of a network, captured at the first call of each combination of shapes and replayed afterwards.

    Key differ by batch, image size, and with or without guidance. If a capture fails, one warning says so and the
    network runs without graphs; out-of-memory errors are raised.

    Threads may share it, on one CUDA stream. A lock keeps a graph's tensors for one call until its result is copied,
    which takes the time of queueing the work, not of computing it.
    """

    def __init__(self, capture: Callable[[Body, tuple[Tensor, ...]], Captured] = on_cuda) -> None:
        self._record = capture
        self._captured: dict[Key, Captured] = {}
        self._fails = False
        self._one_call = threading.Lock()

    def __call__(self, body: Body, *inputs: Tensor) -> Tensor:
        """body(*inputs). A body of one name must be the same at every call."""
        key: Key = (body.__name__, *(value.shape for value in inputs))
        with self._one_call:
            if key in self._captured or (not self._fails and self._capture(body, key, inputs)):
                captured = self._captured[key]
                for own, value in zip(captured.inputs, inputs, strict=True):
                    own.copy_(value)
                captured.replay()
                return captured.out.clone()
        return body(*inputs)

    def __len__(self) -> int:
        return len(self._captured)

    def forget(self) -> None:
        """Free every graph and its memory. The next call of a shape captures it again."""
        with self._one_call:
            self._drop(list(self._captured))

    def _drop(self, keys: Iterable[Key]) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # replays that are queued still use their memory
        for key in keys:
            del self._captured[key]

    def _capture(self, body: Body, key: Key, inputs: tuple[Tensor, ...]) -> bool:
        """Capture the graph of these shapes; whether it worked."""
        if len(self._captured) >= MOST:
            self._drop([next(iter(self._captured))])
        try:
            self._captured[key] = self._record(body, tuple(value.clone() for value in inputs))
        except (RuntimeError, AssertionError) as error:
            # Ending a failed capture raises too, and hides the error that made it fail.
            for cause in (error, error.__context__):
                if cause is not None and out_of_memory(cause):
                    raise cause from None
            self._fails = True
            logging.getLogger("ldit").warning("CUDA graphs are off, the capture failed: %s", str(error).splitlines()[0])
            return False
        return True
