"""The order of samples and the loader: shares of processes, threads, faults, early ends."""

import threading
import time
import tracemalloc
from collections.abc import Sequence
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from ldit.data.batch import Batch
from ldit.data.images.image_set import ImageSet
from ldit.data.loader import AHEAD, Loader, load_batch
from ldit.data.order import EpochOrder
from ldit.errors import DataError
from ldit.rng import uniform

EPOCHS = [  # size 10, seed 3: randperm(10) seeded by 3, 4, 5; runs on disk depend on it
    [6, 0, 3, 7, 8, 5, 1, 9, 2, 4],
    [0, 4, 9, 6, 7, 3, 2, 8, 1, 5],
    [1, 4, 9, 6, 3, 5, 0, 2, 8, 7],
]


class Fake(ImageSet):
    """Images made of their own index; notes its readings, fails at `bad` ones and lets the `slow` ones wait."""

    root, size, names = Path("fake"), 4, ("a", "b", "c")

    def __init__(self, count: int, bad: Sequence[int] = (), slow: Sequence[int] = ()) -> None:
        self.count = self.num_before_cap = count
        self.bad, self.slow, self.gate = bad, set(slow), threading.Event()
        self.seen: list[int] = []
        self.threads: set[str] = set()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        self.threads.add(threading.current_thread().name)
        if index in self.slow:
            assert self.gate.wait(30)
        self.seen.append(index)
        if index in self.bad:
            raise DataError(f"cannot read image {index}.png")
        return np.random.default_rng(index).integers(0, 256, (4, 4, 3), dtype=np.uint8), index % 3

    def where(self, index: int) -> str:
        return f"{index}.png"

    def fingerprint(self) -> str:
        return "fake"


def same(a: Batch, b: Batch) -> bool:
    return torch.equal(a.inputs, b.inputs) and torch.equal(a.labels, b.labels) and a.positions == b.positions


def loader_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("loader")]


def test_the_order_never_changes() -> None:
    order = EpochOrder(10, 3)
    for epoch in (0, 2, 1):  # in any order
        assert [order[10 * epoch + i] for i in range(10)] == EPOCHS[epoch]
    assert order.between(4, 26) == EPOCHS[0][4:] + EPOCHS[1] + EPOCHS[2][:6]
    assert order.between(9, 9) == []
    positions, indices = order.batch(1, 12)
    assert positions == range(12, 24) and indices == EPOCHS[1][2:] + EPOCHS[2][:4]
    assert order._shuffled(1) is order._shuffled(1)  # kept until another epoch is asked for
    assert type(order[0]) is int and {type(i) for i in indices} == {int}


def test_one_batch_spans_epochs() -> None:
    _, indices = EpochOrder(3, 1).batch(0, 10)
    shuffles = [torch.randperm(3, generator=torch.Generator().manual_seed(1 + e)).tolist() for e in range(4)]
    assert indices == [i for shuffle in shuffles for i in shuffle][:10]


def test_the_order_takes_little_memory() -> None:
    """Four bytes a sample, from first use; a long run costs nothing at its start."""
    next(Loader(Fake(3388), 16, 0, False, workers=0).from_step(0, 1))  # what first use imports
    loader = Loader(Fake(3388), 16, 0, False, workers=0)
    assert loader.order._permutation.nbytes == 0
    tracemalloc.start()
    batches = loader.from_step(0, 3_000_000)
    next(batches)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000
    assert loader.order._permutation.nbytes == 4 * 3388


def test_a_batch_is_scaled_and_mirrored_by_position() -> None:
    data, positions, indices = Fake(9), range(100, 108), [8, 1, 1, 0, 4, 7, 3, 2]
    batch = load_batch(data, positions, indices, 5)
    pictures = [data[i][0] for i in indices]
    mirrored = [uniform(5, "flip", 0, p) < 0.5 for p in positions]
    assert any(mirrored) and not all(mirrored)
    turned = np.stack([p[:, ::-1] if m else p for p, m in zip(pictures, mirrored, strict=True)])
    assert torch.equal(batch.inputs, torch.from_numpy(turned).permute(0, 3, 1, 2).float() / 127.5 - 1.0)
    assert batch.inputs.is_contiguous() and batch.labels.tolist() == [i % 3 for i in indices]
    assert batch.positions == tuple(positions)


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_threads_change_nothing(workers: int) -> None:
    plain, threaded = Fake(11), Fake(11)
    expected = list(Loader(plain, 5, 3, True, workers=0).from_step(2, 9))
    found = list(Loader(threaded, 5, 3, True, workers=workers).from_step(2, 9))
    assert len(found) == 7 and all(same(a, b) for a, b in zip(expected, found, strict=True))
    assert plain.threads == {threading.current_thread().name}
    assert threaded.threads and all(name.startswith("loader") for name in threaded.threads)
    assert not loader_threads()


@pytest.mark.parametrize(("parts", "offset"), [(1, 0), (2, 0), (3, 7), (6, 1000)])
def test_parts_make_the_whole(parts: int, offset: int) -> None:
    """The shares of a step, joined in order, are the batch of one process; positions are the stream's."""
    whole = Loader(Fake(10), 6, 3, True, workers=0).from_step(1, 5, offset)
    shares = [Loader(Fake(10), 6, 3, True, part=p, parts=parts).from_step(1, 5, offset) for p in range(parts)]
    for step, (expected, *found) in enumerate(zip(whole, *shares, strict=True), 1):
        assert {len(batch) for batch in found} == {6 // parts}
        positions = tuple(p for batch in found for p in batch.positions)
        assert positions == expected.positions == tuple(range(offset + 6 * step, offset + 6 * step + 6))
        assert torch.equal(torch.cat([b.inputs for b in found]), expected.inputs)
        assert torch.equal(torch.cat([b.labels for b in found]), expected.labels)


@pytest.mark.parametrize(("size", "part", "parts"), [(5, 0, 2), (4, 2, 2), (4, -1, 2), (4, 0, 0)])
def test_parts_that_do_not_exist(size: int, part: int, parts: int) -> None:
    with pytest.raises(ValueError, match="part"):
        Loader(Fake(10), size, 0, False, part=part, parts=parts)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_fault_comes_at_its_step_and_names_the_first_image(workers: int) -> None:
    """Sample 9 stands at position 7 (EPOCHS), so the second step fails, though it is read during the first."""
    batches = Loader(Fake(10, bad=(9, 4)), 4, 3, False, workers).from_step(0, 100)
    assert next(batches).positions == (0, 1, 2, 3)
    time.sleep(0.05)  # the fault has happened by now
    with pytest.raises(DataError, match=r"image 9\.png"):
        next(batches)
    assert next(batches, None) is None
    assert not loader_threads()
    data = Fake(10, bad=(3, 1), slow=(3,))  # rows 2 and 6 of eight: another thread meets 1 before 3 is read
    timer = threading.Timer(0.05, data.gate.set)
    timer.start()
    with pytest.raises(DataError, match=r"image 3\.png"):
        next(Loader(data, 8, 3, False, workers).from_step(0, 100))
    timer.join()


def test_work_is_ahead_but_not_far() -> None:
    data = Fake(1000)
    with closing(Loader(data, 4, 0, False, workers=2).from_step(0, 100)) as batches:
        next(batches)
        deadline = time.monotonic() + 30
        while len(data.seen) < 4 * (1 + AHEAD) and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.05)
        assert len(data.seen) == 4 * (1 + AHEAD)


def test_several_threads_share_one_batch() -> None:
    """Three readings are under way at once while the first batch is waited for."""
    barrier = threading.Barrier(3)

    class Meeting(Fake):
        def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
            barrier.wait(30)  # passes only with three threads at once
            return super().__getitem__(index)

    assert len(list(Loader(Meeting(10), 3, 0, False, workers=3).from_step(0, 1))) == 1


@pytest.mark.parametrize("way", ["close", "error", "forgotten"])
def test_an_early_end_stops_the_threads(way: str) -> None:
    data = Fake(1000, slow=EpochOrder(1000, 0).between(500, 1000))  # all but the first batch
    batches = Loader(data, 500, 0, False, workers=2).from_step(0, 100)
    next(batches)
    timer = threading.Timer(0.05, data.gate.set)
    timer.start()
    if way == "close":
        batches.close()
    elif way == "error":
        with pytest.raises(RuntimeError, match="consumer"), closing(batches):
            raise RuntimeError("consumer")
    else:
        del batches
    assert not loader_threads()
    timer.join()
    assert len(data.seen) <= 500 + 2  # each thread ends the image it is at


def test_a_run_of_no_steps_and_one_never_begun() -> None:
    assert list(Loader(Fake(10), 4, 0, False).from_step(3, 3)) == []
    Loader(Fake(10), 4, 0, False).from_step(0, 9).close()
    assert not loader_threads()


def test_r1_every_step_is_the_same_batch_for_anybody() -> None:
    """World sizes 1, 2 and 4, on no thread and on two, begun at every step of a 24-step run over 2.4 epochs."""
    steps, size, data = 24, 8, Fake(80)
    whole = list(Loader(data, size, 7, True, workers=0).from_step(0, steps))
    epochs = [position // 80 for batch in whole for position in batch.positions]
    assert epochs.count(0) == epochs.count(1) == 80  # and each sample once in each, below
    order = EpochOrder(80, 7)
    assert all(sorted(order.between(80 * e, 80 * e + 80)) == list(range(80)) for e in range(3))
    state = torch.get_rng_state()
    for parts in (1, 2, 4):
        for workers in (0, 2):
            loaders = [Loader(data, size, 7, True, workers, part, parts) for part in range(parts)]
            for first in range(steps):
                last = min(first + 2, steps)  # a resumed run's first steps
                shares = [list(loader.from_step(first, last)) for loader in loaders]
                for offset, batch in enumerate(whole[first:last]):
                    assert torch.equal(torch.cat([share[offset].inputs for share in shares]), batch.inputs)
                    assert torch.equal(torch.cat([share[offset].labels for share in shares]), batch.labels)
                    assert sum((share[offset].positions for share in shares), ()) == batch.positions
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is nobody's


def test_a_run_of_ten_billion_steps_begins_at_once() -> None:
    data = Fake(1_281_167)
    Loader(data, 256, 0, True).from_step(0, 1).close()
    seconds = []
    for _ in range(5):  # the least: others may be at work on this machine
        tracemalloc.start()
        began = time.process_time()
        batches = Loader(data, 256, 0, True).from_step(0, 10_000_000_000)
        seconds.append(time.process_time() - began)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        batches.close()
        assert peak < 1_000_000
    assert min(seconds) < 0.010


def test_steps_take_consecutive_positions() -> None:
    batches = list(Loader(Fake(10), 4, 0, False).from_step(0, 5))
    assert all(b.positions[0] == a.positions[-1] + 1 for a, b in pairwise(batches))
