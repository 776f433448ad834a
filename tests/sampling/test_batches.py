"""Batches halved when memory runs out: what is made, in which sizes, what is said, what stays an error."""

import weakref
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ldit.errors import RequestError
from ldit.sampling.fast.oom import in_batches, out_of_memory

CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


class Device:
    """Makes at most `room` images together: three previews each batch, the error before the third, then images."""

    def __init__(self, room: int, error: BaseException = CUDA) -> None:
        self.room, self.error = room, error
        self.tried: list[range] = []

    def run(self, rows: range) -> Iterator[tuple[str, int]]:
        self.tried.append(rows)
        for step in range(3):
            if step == 2 and len(rows) > self.room:
                raise self.error
            yield "preview", step
        for row in rows:
            yield "picture", row


def made(device: Device, count: int, size: int, **options: int) -> tuple[list[int], list[tuple[int, int]]]:
    said: list[tuple[int, int]] = []
    events = in_batches(count, size, device.run, lambda *numbers: said.append(numbers), "do less", **options)
    return [number for word, number in events if word == "picture"], said


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 16])
@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("room", [1, 2, 3, 5, 8])
def test_every_image_once_and_in_order(count: int, size: int, room: int) -> None:
    device = Device(room)
    images, said = made(device, count, size)
    assert images == list(range(count))
    assert all(new < old for (old, _), (new, _) in pairwise(said))
    assert bool(said) == (min(count, size) > room)


def test_the_smaller_size_stays_and_is_said() -> None:
    device = Device(3)
    images, said = made(device, 20, 8)
    assert images == list(range(20))
    assert said == [(4, 20), (2, 20)]
    assert [len(rows) for rows in device.tried] == [8, 4, *[2] * 10]


def test_half_is_of_the_batch_that_failed() -> None:
    device = Device(2)
    assert made(device, 3, 16) == ([0, 1, 2], [(1, 3)])


def test_one_image_that_does_not_fit_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(RequestError, match="memory does not suffice for one image: do less"):
        made(Device(0), 5, 4)


def test_what_cannot_be_split_is_not_begun_again() -> None:
    device = Device(2)
    with pytest.raises(RequestError, match="5 images that cannot be split: do less"):
        made(device, 5, 5, smallest=5)
    assert len(device.tried) == 1


def test_what_is_held_for_speed_goes_first() -> None:
    """At each lack of memory, before the smaller batch; and once it has gone, the smallest is tried again."""
    order: list[str] = []

    def run(rows: range) -> Iterator[int]:
        order.append(f"{len(rows)} rows")
        if order.count("released") < 3:
            raise CUDA
        yield from rows

    def release() -> bool:
        order.append("released")
        return True

    found = in_batches(2, 2, run, lambda size, left: order.append(f"now {size}"), "", release=release)
    assert list(found) == [0, 1]
    rows = ["2 rows", "released", "now 1", "1 rows", "released", "1 rows", "released", "1 rows", "1 rows"]
    assert order == rows
    with pytest.raises(RequestError, match="one image"):
        list(in_batches(1, 1, Device(0).run, lambda *_: None, "", release=lambda: False))


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not match"), ValueError("out of memory"), KeyboardInterrupt()]
)
def test_other_errors_pass(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        made(Device(1, error), 4, 2)
    assert caught.value is error


def test_tensors_of_the_failed_batch_are_gone_before_the_next_begins() -> None:
    alive: list[weakref.ref[Tensor]] = []
    left: list[int] = []

    def run(rows: range) -> Iterator[int]:
        left.append(sum(reference() is not None for reference in alive))
        x = torch.zeros(len(rows))
        alive.append(weakref.ref(x))
        if len(rows) > 1:
            raise RuntimeError("CUDA error: out of memory")
        yield from rows

    assert list(in_batches(4, 4, run, lambda *_: None, "")) == [0, 1, 2, 3]
    assert left == [0] * 6


@pytest.mark.parametrize(
    "text",
    [
        "CUDA out of memory. Tried to allocate 1.00 GiB",
        "MPS backend out of memory (MPS allocated: 1 GB)",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "[enforce fail at alloc_cpu.cpp:66] . DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.",
    ],
)
def test_words_of_torch(text: str) -> None:
    assert out_of_memory(RuntimeError(text)) and not out_of_memory(ValueError(text))


def test_the_allocator_of_this_machine() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    assert out_of_memory(caught.value)
    assert out_of_memory(MemoryError()) and not out_of_memory(RuntimeError("x"))
