"""Several requests of one pipeline at once, in one thread or in several: each gives the images it gives alone. And
what becomes of captured graphs when memory runs out."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from pipeline.models import MODEL, tiny
from sampling.captures import Recorder
from torch import Tensor

from ldit.errors import RequestError
from ldit.pipeline import loaded as pipeline
from ldit.pipeline.generate import Sample
from ldit.pipeline.load import Pipeline
from ldit.sampling.fast import prepare as preparing
from ldit.sampling.fast.conditioning_cache import ModulationCache
from ldit.sampling.fast.graphs import Graphs
from ldit.sampling.fast.prepare import Prepared

REQUESTS: list[dict[str, Any]] = [
    {"class_labels": [0, 1], "seed": 3, "steps": 7, "guidance": 3.0},
    {"class_labels": [2, 3], "seed": 9, "steps": 5, "solver": "dpm++2m"},
    {"class_labels": [1, 1], "seed": 5, "steps": 6, "guidance": 1.0},
]


pytestmark = pytest.mark.usefixtures("one_thread")  # bits are compared


def prepared(pipe: Pipeline) -> Prepared:
    network = pipe.network
    assert isinstance(network, Prepared)
    return network


def with_graphs(pipe: Pipeline, recorder: Recorder) -> Graphs:
    """As on a GPU: evaluations are captured."""
    prepared(pipe).graphs = graphs = Graphs(recorder)
    return graphs


def latents(events: Any) -> Tensor:
    return torch.stack([event.latent for event in events if isinstance(event, Sample)])


def made(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of conditioning, at each time some were made."""
    rows: list[int] = []
    real = ModulationCache.rows
    monkeypatch.setattr(ModulationCache, "rows", lambda self, pairs: rows.append(len(pairs)) or real(self, pairs))
    return rows


@pytest.mark.parametrize("captured", [False, True])
def test_iterators_by_turns(captured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each keeps the conditioning that was made for it: as much is made as for one after the other."""
    alone = [tiny().sample_latents(**request) for request in REQUESTS]
    pipe = tiny()
    if captured:
        with_graphs(pipe, Recorder())
    rows = made(pipe, monkeypatch)
    for request in REQUESTS:
        pipe.sample_latents(**request)
    once = sorted(rows)
    rows.clear()
    running = [pipe.iterate(**request, preview_every=1) for request in REQUESTS]
    found: list[list[Any]] = [[] for _ in running]
    for _ in range(9):
        for iterator, events in zip(running, found, strict=True):
            if (event := next(iterator, None)) is not None:
                events.append(event)
    assert sorted(rows) == once
    for iterator, events, expected in zip(running, found, alone, strict=True):
        assert torch.equal(latents([*events, *iterator]), expected)


@pytest.mark.parametrize("captured", [False, True])
def test_threads(captured: bool) -> None:
    alone = [tiny().sample_latents(**request) for request in REQUESTS]
    pipe = tiny()
    if captured:
        with_graphs(pipe, Recorder(pause=0.001))
    begin = threading.Barrier(len(REQUESTS))

    def work(request: dict[str, Any]) -> Tensor:
        torch.set_num_threads(1)
        begin.wait()
        return latents(pipe.iterate(**request, preview_every=1))

    with ThreadPoolExecutor(len(REQUESTS)) as pool:
        together = list(pool.map(work, REQUESTS))
    assert all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))


def test_an_iterator_goes_on_in_another_thread() -> None:
    """As servers run them, each step in any thread of a pool; and it may be left there unfinished."""
    pipe, request = tiny(), REQUESTS[0]
    expected, events = pipe.sample_latents(**request), pipe.iterate(**request, preview_every=1)
    left = pipe.iterate(**request, preview_every=1)
    found: list[Any] = []
    for _ in range(10):
        for iterator in (events, left):
            step = threading.Thread(target=lambda it=iterator: found.append((it is events, next(it, None))))
            step.start()
            step.join()
            if iterator is left and len(found) > 6:
                iterator.close()  # type: ignore[attr-defined]
    assert torch.equal(latents([event for own, event in found if own]), expected)


def test_what_is_made_at_first_use_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, copies, codecs = tiny(), [], []
    prepare, open_codec = preparing.prepare, pipeline.open_codec

    def slow(made: list[int], function: Any) -> Any:
        def run(*given: Any) -> Any:
            time.sleep(0.05)
            made.append(1)
            return function(*given)

        return run

    monkeypatch.setattr(preparing, "prepare", slow(copies, prepare))
    monkeypatch.setattr(pipeline, "open_codec", slow(codecs, open_codec))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda seed: pipe.sample([0], seed=seed, steps=1), range(4)))
    assert len(copies) == len(codecs) == 1


def test_weights_changed_in_place_count_from_the_next_request_on() -> None:
    pipe = tiny()
    first = pipe.sample_latents([0, 1], steps=2)
    pipe.model.layers[0].adaLN_modulation[1].weight.mul_(2.0)  # type: ignore[index, union-attr, operator]
    other = tiny()
    other.model.layers[0].adaLN_modulation[1].weight.mul_(2.0)  # type: ignore[index, union-attr, operator]
    second = pipe.sample_latents([0, 1], steps=2)
    assert torch.equal(second, other.sample_latents([0, 1], steps=2)) and not torch.equal(first, second)


def test_graphs_go_before_a_smaller_batch_is_tried(caplog: pytest.LogCaptureFixture) -> None:
    """Those of requests before, too; the request goes on without, the next one captures again."""
    pipe, recorder = tiny(), Recorder()
    graphs = with_graphs(pipe, recorder)
    pipe.sample_latents([0], guidance=1, steps=2)
    expected = pipe.sample_latents([0, 1, 2, 3], guidance=1, steps=2, batch_size=2)
    assert recorder.seen == [(1, 3, 8, 8), (2, 3, 8, 8)] and len(graphs) == 2
    network, held = prepared(pipe), []
    body = network._body

    def short(x: Tensor, *rest: Tensor) -> Tensor:
        held.append((len(x), len(graphs)))
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return body(x, *rest)

    network._body = short  # type: ignore[method-assign]
    found = pipe.sample_latents([0, 1, 2, 3], guidance=1, steps=2)
    assert torch.equal(found, expected)
    assert held == [(4, 2), *[(2, 0)] * 4], "nothing is kept where memory was short"
    assert [record.getMessage() for record in caplog.records] == [
        "out of memory: without CUDA graphs from here on",
        "out of memory: batches of 2 from here on, 4 images to go",
    ]
    pipe.sample_latents([0], guidance=1, steps=2)
    assert len(graphs) == 1 and prepared(pipe).graphs is graphs


def test_a_image_that_fits_without_graphs_alone() -> None:
    pipe = tiny()
    expected = pipe.sample_latents([0], guidance=1, steps=2)
    graphs = with_graphs(pipe, Recorder(room=0))
    assert torch.equal(pipe.sample_latents([0], guidance=1, steps=2), expected) and len(graphs) == 0


def test_a_image_that_fits_neither_way_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, tried = tiny(), []
    with_graphs(pipe, Recorder())

    def short(x: Tensor, *_: Tensor) -> Tensor:
        tried.append(len(x))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    prepared(pipe)._body = short  # type: ignore[method-assign]
    with pytest.raises(RequestError, match="memory does not suffice for one image"):
        pipe.sample_latents([0, 1], guidance=1, steps=2)
    assert tried == [2, 1]


def test_both_networks_of_a_guided_request_let_go() -> None:
    pipe, guide = tiny(), tiny(weights=1)
    both = [with_graphs(one, Recorder()) for one in (pipe, guide)]
    expected = pipe.sample_latents([0], guidance=2.0, guide=guide, steps=2)
    assert [len(graphs) for graphs in both] == [1, 1]
    decode = pipe.codec.decode
    failed: list[int] = []

    def short(z: Tensor) -> Tensor:
        if not failed:
            failed.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory")
        assert [len(graphs) for graphs in both] == [0, 0]
        return decode(z)

    pipe.codec.decode = short  # type: ignore[method-assign]
    found = pipe.sample([0], guidance=2.0, guide=guide, steps=2, output_type="tensor")
    assert failed and torch.equal(found, decode(expected)) and MODEL.in_channels == 3
