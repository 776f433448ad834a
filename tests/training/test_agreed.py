"""What one process cannot do, none has done: whose exception is raised where, told between threads that stand for the
processes. `tests/distributed` does the same with real ones."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from folders import said

from ldit.errors import DataError, LditError, RunError, SourceError
from ldit.parallel.world import World


class Table:
    """Where `size` threads lay down what they say, and read it when all have."""

    def __init__(self, size: int) -> None:
        self.said: dict[int, Any] = {}
        self.round = threading.Barrier(size)


@dataclass(frozen=True)
class Side(World):
    """One of several worlds in this process."""

    table: Table = field(default_factory=lambda: Table(1))

    def gather(self, value: Any, group: Any = None) -> list[Any]:
        self.table.round.wait(10)  # everybody has read what was said before
        self.table.said[self.rank] = value
        self.table.round.wait(10)
        return [self.table.said[rank] for rank in range(self.size)]


def each(size: int, work: Callable[[World], Any]) -> list[Any]:
    """What `work` returns or raises on each of `size` processes."""
    table = Table(size)

    def one(rank: int) -> Any:
        try:
            return work(Side(torch.device("cpu"), rank, size, table=table))
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(one, range(size)))


def met(*faults: Exception | None) -> list[Any]:
    """What each process gets that brings this fault, or none and its rank."""

    def brought(world: World) -> int:
        fault = faults[world.rank]
        if fault is not None:
            raise fault
        return world.rank

    return each(len(faults), lambda world: world.run_on_all(lambda: brought(world)))


def test_without_a_fault_each_has_its_own_result() -> None:
    assert met(None, None, None) == [0, 1, 2]


FAULTS: dict[str, Callable[[], Exception | None]] = {
    ".": lambda: None,
    "S": lambda: SourceError("damaged"),
    "R": lambda: RunError("stale"),
    "D": lambda: DataError("no image"),
    "O": lambda: OSError(5, "broken"),
}


@pytest.mark.parametrize(
    ("kinds", "chosen"),
    [("SR", 1), ("RS", 0), ("S.RD", 2), ("SDR", 1), (".SS", 1), ("..R", 2), ("SSS", 0), ("RRR", 0), ("SO", 1)],
)
def test_one_fault_is_raised_on_all(kinds: str, chosen: int) -> None:
    """The first that is not damage, or the first. Its process raises the very object, the others a LditError that
    another process prints, whatever their own fault was."""
    faults = [FAULTS[kind]() for kind in kinds]
    worst, found = faults[chosen], met(*faults)
    assert found[chosen] is worst and not getattr(worst, "said_elsewhere", False)
    heard = [error for rank, error in enumerate(found) if rank != chosen]
    words = str(worst) if isinstance(worst, LditError) else f"process {chosen}: {worst}"
    kind = type(worst) if isinstance(worst, LditError) else RunError
    assert [(type(error), str(error), error.said_elsewhere) for error in heard] == [(kind, words, True)] * len(heard)
    assert [error.__cause__ for error in heard] == [fault for rank, fault in enumerate(faults) if rank != chosen]


def test_only_the_first_works_and_all_have_its_result() -> None:
    asked: list[int] = []

    def work(world: World) -> Any:
        return world.from_rank0(lambda: asked.append(world.rank) or {"from": world.rank})

    assert each(3, work) == [{"from": 0}] * 3 and asked == [0]


def test_a_fault_of_the_first_is_printed_once() -> None:
    def fail() -> None:
        raise SourceError("in use")

    found = each(3, lambda world: world.from_rank0(fail))
    assert [(type(error), str(error), error.said_elsewhere) for error in found] == [
        (SourceError, "in use", rank > 0) for rank in range(3)
    ]


def test_a_failure_that_nobody_hears_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the others take long; one that is heard at once is not."""
    monkeypatch.setattr("ldit.parallel.world.UNHEARD", 0.1)

    def work(world: World, pause: float) -> None:
        if world.rank == 1:
            raise DataError("broken")
        time.sleep(pause)

    for pause in (0.5, 0.0):
        with said() as lines:
            found = each(2, lambda world, pause=pause: world.run_on_all(lambda: work(world, pause)))
        assert [type(one) for one in found] == [DataError, DataError]
        assert lines == (["process 1 waits for the others: broken"] if pause else [])


def test_a_failure_outlives_the_group() -> None:
    """Where the others never come it is that which is raised, not that they did not."""

    class Lost(World):
        def gather(self, value: Any, group: Any = None) -> list[Any]:
            raise RuntimeError("timed out")

    lost = Lost(torch.device("cpu"), 1, 2)
    with pytest.raises(DataError, match="broken"):
        lost.run_on_all(lambda: _fail(DataError("broken")))
    with pytest.raises(RuntimeError, match="timed out"):
        lost.run_on_all(lambda: None)


def _fail(error: Exception) -> None:
    raise error


def test_alarms_are_heard_by_all() -> None:
    store = torch.distributed.HashStore()
    one, other, alone = (
        World(torch.device("cpu"), rank, 2, store=s) for rank, s in ((0, store), (1, store), (0, None))
    )
    assert not one.alarmed("fire")
    other.alarm("fire")
    alone.alarm("flood")
    assert one.alarmed("fire") and other.alarmed("fire") and not one.alarmed("flood") and not alone.alarmed("flood")
