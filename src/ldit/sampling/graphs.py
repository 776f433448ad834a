"""One whole evaluation as a CUDA graph: a launch in the place of hundreds."""

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Body = Callable[[Tensor, Tensor, Tensor], Tensor]
MOST = 8  # shapes that are kept; a graph holds the memory of its activations


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    out: Tensor


class Graphs:
    """`body` of three tensors, captured at the first call of each combination of shapes (so of batch, size, and guided
    or not) and replayed afterwards. Where a capture fails, one line says so and `body` runs as it is."""

    def __init__(self, body: Body) -> None:
        self.body = body
        self._captured: dict[tuple[torch.Size, ...], _Captured] = {}
        self._fails = False

    def __call__(self, *inputs: Tensor) -> Tensor:
        key = tuple(value.shape for value in inputs)
        if self._fails or (key not in self._captured and not self._capture(key, inputs)):
            return self.body(*inputs)
        captured = self._captured[key]
        for own, value in zip(captured.inputs, inputs, strict=True):
            own.copy_(value)
        captured.graph.replay()
        return captured.out.clone()

    def _capture(self, key: tuple[torch.Size, ...], inputs: tuple[Tensor, ...]) -> bool:
        if len(self._captured) >= MOST:
            self._captured.pop(next(iter(self._captured)))
        own = tuple(value.clone() for value in inputs)
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # kernels are chosen and libraries opened before
                for _ in range(2):
                    self.body(*own)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = self.body(*own)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, AssertionError) as error:
            self._fails = True
            logging.getLogger("ldit").warning("no CUDA graph: %s", str(error).splitlines()[0])
            return False
        self._captured[key] = _Captured(graph, own, out)
        return True
