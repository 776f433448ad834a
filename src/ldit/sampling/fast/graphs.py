"""One whole evaluation as a CUDA graph: a launch in the place of hundreds."""

import logging
import threading
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ldit.sampling.fast.oom import out_of_memory

Body = Callable[[Tensor, Tensor, Tensor], Tensor]
Shapes = tuple[torch.Size, ...]
MOST = 8  # shapes that are kept; a graph holds the memory of its activations


class Captured(NamedTuple):
    """`replay` computes `out` from what `inputs` hold."""

    replay: Callable[[], None]
    inputs: tuple[Tensor, ...]
    out: Tensor


def on_cuda(body: Body, inputs: tuple[Tensor, ...]) -> Captured:
    """`body` recorded as a CUDA graph over these tensors. One at a time in a process."""
    current = torch.cuda.current_stream()
    side = torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):  # kernels are chosen and libraries opened before
        for _ in range(2):
            body(*inputs)
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        # Other threads may allocate meanwhile, where they decode.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            out = body(*inputs)
    finally:
        torch.cuda.set_stream(current)  # a capture that fails leaves its own behind
    return Captured(graph.replay, inputs, out)


class Graphs:
    """A network's evaluation of three tensors, captured at the first call of each combination of shapes (so of batch,
    size, and guided or not) and replayed afterwards. Where a capture fails, one line says so and the evaluation runs as
    it is; where memory is short, that is raised as it is.

    Threads may share it: a graph's tensors are one call's until its result is copied. That takes the time of queueing,
    not of computing. All of them work on one stream, as threads do that choose none.
    """

    def __init__(self, capture: Callable[[Body, tuple[Tensor, ...]], Captured] = on_cuda) -> None:
        self._record = capture
        self._captured: dict[Shapes, Captured] = {}
        self._fails = False
        self._one_call = threading.Lock()

    def __call__(self, body: Body, *inputs: Tensor) -> Tensor:
        """body(*inputs); `body` is the same at every call."""
        key = tuple(value.shape for value in inputs)
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
        """Let go of every graph and its memory; they are captured again when they are next wanted."""
        with self._one_call:
            self._drop(list(self._captured))

    def _drop(self, keys: Iterable[Shapes]) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # what is queued still computes in their memory
        for key in keys:
            del self._captured[key]

    def _capture(self, body: Body, key: Shapes, inputs: tuple[Tensor, ...]) -> bool:
        if len(self._captured) >= MOST:
            self._drop([next(iter(self._captured))])
        try:
            self._captured[key] = self._record(body, tuple(value.clone() for value in inputs))
        except (RuntimeError, AssertionError) as error:
            for fault in (error, error.__context__):  # the end of a capture complains too, and hides why
                if fault is not None and out_of_memory(fault):
                    raise fault from None
            self._fails = True
            logging.getLogger("ldit").warning("no CUDA graph: %s", str(error).splitlines()[0])
            return False
        return True
