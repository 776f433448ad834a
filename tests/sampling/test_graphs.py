"""Captured evaluations: kept by shape, shared by threads, let go of; a capture that fails or does not fit."""

import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from sampling.captures import Recorder
from torch import Tensor

from ldit.sampling.fast import graphs as module
from ldit.sampling.fast.graphs import MOST, Captured, Graphs

ONE = torch.ones(1)


def body(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return 2.0 * x + y * z


def test_captured_once_for_each_shape() -> None:
    recorder = Recorder()
    graphs = Graphs(recorder)
    for turn in range(3):
        for rows in (2, 5):
            x = torch.full((rows, 3), float(turn))
            assert torch.equal(graphs(body, x, ONE, ONE), 2.0 * x + 1.0)
    assert recorder.seen == [(2, 3), (5, 3)] and len(graphs) == 2
    first = graphs(body, torch.zeros(2, 3), ONE, ONE)
    graphs(body, torch.ones(2, 3), ONE, ONE)
    assert first.eq(1.0).all(), "a result is the caller's own"


def test_the_oldest_goes_for_a_new_one() -> None:
    recorder = Recorder()
    graphs = Graphs(recorder)
    for rows in range(1, MOST + 2):
        graphs(body, torch.zeros(rows), ONE, ONE)
    assert len(graphs) == MOST
    graphs(body, torch.zeros(MOST + 1), ONE, ONE)
    assert len(recorder.seen) == MOST + 1
    graphs(body, torch.zeros(1), ONE, ONE)
    assert recorder.seen[-1] == (1,) and len(graphs) == MOST


def test_what_is_forgotten_is_freed_and_captured_again() -> None:
    alive: list[weakref.ref[Tensor]] = []
    recorder = Recorder()

    def capture(body: Any, inputs: tuple[Tensor, ...]) -> Captured:
        captured = recorder(body, inputs)
        alive.extend(weakref.ref(tensor) for tensor in (*captured.inputs, captured.out))
        return captured

    graphs = Graphs(capture)
    graphs(body, torch.zeros(3), ONE, ONE)
    assert len(alive) == 4 and all(reference() is not None for reference in alive)
    graphs.forget()
    assert len(graphs) == 0 and all(reference() is None for reference in alive)
    assert torch.equal(graphs(body, torch.zeros(3), ONE, ONE), torch.ones(3)) and len(recorder.seen) == 2


def test_a_graphs_tensors_are_one_calls_at_a_time() -> None:
    graphs = Graphs(Recorder(pause=0.002))

    def work(number: int) -> bool:
        x = torch.full((4,), float(number))
        return all(torch.equal(graphs(body, x, ONE, ONE), 2.0 * x + 1.0) for _ in range(10))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_a_capture_that_fails_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    tried: list[int] = []

    def fail(*_: Any) -> Captured:
        tried.append(1)
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    graphs = Graphs(fail)
    for rows in (2, 2, 3):
        assert torch.equal(graphs(body, torch.zeros(rows), ONE, ONE), torch.ones(rows))
    said = [record.getMessage() for record in caplog.records]
    assert said == ["CUDA graphs are off, the capture failed: operation not permitted when stream is capturing"]
    assert len(tried) == 1


def test_a_capture_that_does_not_fit_is_no_fault_of_capturing() -> None:
    """The end of a capture may complain in its turn."""

    def short(*_: Any) -> Captured:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def short_and_broken(*_: Any) -> Captured:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    for fault in (short, short_and_broken):
        graphs = Graphs(fault)
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError):
                graphs(body, torch.zeros(2), ONE, ONE)
        graphs._record = Recorder()
        graphs(body, torch.zeros(2), ONE, ONE)
        assert len(graphs) == 1, "captured once there is room"


def test_nothing_goes_while_a_graph_is_computing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropped memory is another's; what is queued must have ended."""
    waited: list[int] = []
    graphs = Graphs(Recorder())
    graphs(body, torch.zeros(2), ONE, ONE)
    monkeypatch.setattr(module.torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(module.torch.cuda, "synchronize", lambda: waited.append(len(graphs)))
    graphs.forget()
    assert waited == [1] and len(graphs) == 0
