"""Saves beside training: one at a time, their failures said once, their copies their own."""

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from smallrun import begin, same_bits, small, tensors, trainer, unequal
from torch import Tensor

from ldit.checkpoint import save
from ldit.errors import RunError
from ldit.parallel.world import World
from ldit.storage import manifest
from ldit.storage.shards import read_set
from ldit.training import checkpointing
from ldit.training.saver import Saver, Staging
from ldit.training.step import Outcome, train_step
from ldit.training.trainer import SAVE_FAILED, Hook


def test_it_runs_beside_the_caller() -> None:
    gate, done = threading.Event(), []
    saver = Saver(asynchronous=True)
    saver.start(lambda: (gate.wait(30), done.append(threading.current_thread())))
    assert done == [] and not saver.failed
    gate.set()
    saver.wait()
    assert done[0] is not threading.current_thread()


def test_or_at_once() -> None:
    done: list[int] = []
    Saver(asynchronous=False).start(lambda: done.append(1))
    assert done == [1]
    with pytest.raises(OSError, match="full"):
        Saver(asynchronous=False).start(_fail)


def _fail() -> None:
    raise OSError("full")


def test_one_at_a_time() -> None:
    """The second begins when the first has ended."""
    saver, running, most, gate = Saver(asynchronous=True), [], [], threading.Event()

    def work(name: int) -> None:
        running.append(name)
        most.append(len(running))
        gate.wait(30)
        running.remove(name)

    saver.start(lambda: work(1))
    threading.Timer(0.05, gate.set).start()
    saver.start(lambda: work(2))
    saver.wait()
    assert most == [1, 1]


def test_a_failure_is_said_once() -> None:
    """By `failed` until someone waits, by `wait` once, and by the next `start` where nobody waited."""
    saver = Saver(asynchronous=True)
    saver.start(_fail)
    assert saver._thread is not None
    saver._thread.join()
    assert saver.failed
    with pytest.raises(OSError, match="full"):
        saver.wait()
    assert not saver.failed
    saver.wait()
    saver.start(_fail)
    done: list[int] = []
    with pytest.raises(OSError, match="full"):
        saver.start(lambda: done.append(1))
    saver.start(lambda: done.append(2))
    saver.wait()
    assert done == [2]


def test_copies_do_not_follow() -> None:
    """A copy keeps its numbers when the value changes, whatever its dtype and shape, up to the next `begin`."""
    parameter = torch.nn.Parameter(torch.arange(4.0))
    values = [parameter, torch.tensor(7.0), torch.ones(3, 5, dtype=torch.bfloat16), torch.empty(0, 2), torch.arange(9)]
    expected = [value.detach().clone() for value in values]
    staging = Staging()
    for _ in range(2):  # the second time in memory that is there already
        staging.begin(values)
        copies = [staging.copy(value) for value in values]
        staging.settle()
        kept = [value.detach().clone() for value in values]
        for value in values:
            value.detach().zero_()
        assert all(same_bits(copy, value) for copy, value in zip(copies, expected, strict=True))
        assert not any(copy.requires_grad for copy in copies)
        for value, number in zip(values, kept, strict=True):
            value.detach().copy_(number)


def test_the_memory_is_kept_and_grows() -> None:
    staging, value = Staging(), torch.ones(100)
    staging.begin([value])
    first = staging.copy(value)
    staging.begin([value])
    assert staging.copy(torch.zeros(100)).data_ptr() == first.data_ptr() and first.abs().max() == 0
    many = [torch.full((100,), float(i)) for i in range(5)]
    staging.begin(many)
    assert [copy.unique().item() for copy in [staging.copy(one) for one in many]] == [0, 1, 2, 3, 4]


def failing(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    real = checkpointing.write_step

    def write(run: Path, step: int, *rest: Any) -> Path:
        if step == at:
            raise OSError("full")
        return real(run, step, *rest)

    monkeypatch.setattr(checkpointing, "write_step", write)


@pytest.mark.parametrize("beside", [False, True])
def test_a_save_that_fails_ends_the_run_with_its_own_error(
    beside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the next step at the latest, as this process's error; the commit before it stands."""
    failing(monkeypatch, 4)
    values = {"train.async_save": beside, "train.checkpoint_every": 2, "train.steps": 6}
    run = trainer(small(values), tmp_path)
    with pytest.raises(OSError, match="full"):
        run.trainer.fit()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


def test_a_save_that_fails_elsewhere_ends_the_run_here(tmp_path: Path) -> None:
    """Another process's flag, which a step's sum brings."""
    run = trainer(small(), tmp_path)
    flags = [0.0] * SAVE_FAILED + [1.0]
    with pytest.raises(RunError, match="another process"):
        run.trainer._rolls_back(Outcome({"loss": 1.0, "grad_norm": 1.0}, "", tuple(flags)))


@pytest.mark.parametrize("kind", ["checkpoints", "snapshots"])
def test_a_slow_save_keeps_its_step(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that take longer than the steps to the next save hold the numbers of their own step."""
    name = "write_step" if kind == "checkpoints" else "write_folder"
    real, seen = getattr(checkpointing, name), {}

    def slow(*given: Any) -> Path:
        time.sleep(0.2)  # several steps
        return real(*given)

    monkeypatch.setattr(checkpointing, name, slow)
    every = "train.checkpoint_every" if kind == "checkpoints" else "ema.snapshot_every"
    config = small({"train.async_save": True, "train.steps": 4, "ema.power": (0.1,), every: 1})
    hooks = [Hook(1, lambda state: seen.setdefault(state.step, tensors(state)) and None)]
    run = trainer(config, tmp_path, hooks=hooks)
    run.trainer.fit()
    stem = "model" if kind == "checkpoints" else "power-0.1000"
    prefix = "master" if kind == "checkpoints" else stem
    folders = sorted((tmp_path / kind).iterdir())
    assert len(folders) == 4
    for folder in folders:
        step = int(folder.name.rpartition("-")[2])
        for parameter, value in read_set(folder, stem):
            assert torch.equal(value, seen[step][f"{prefix} {parameter}"]), (folder.name, parameter)


# ---------------------------------------------------------------- a step and a snapshot at once

POWER = "power-0.1000"


class Counting(Staging):
    """Staging that counts how often it is begun, and says who made its memory."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.makers = 0, list[str]()

    def begin(self, values: Sequence[Tensor]) -> None:
        self.begun += 1
        super().begin(values)

    def _grow(self, needed: int, device: torch.device | None) -> None:
        self.makers.append(threading.current_thread().name)
        super()._grow(needed, device)


def test_a_step_and_a_snapshot_are_copied_once(tmp_path: Path) -> None:
    """Both folders hold the numbers of the moment of the copy, and progress is said while either is written."""
    config = small({"ema.power": (0.1,)})
    state, task, loader = begin(config)
    first, second = loader.from_step(0, 2)
    train_step(state, task, first)
    staging, before, seen = Counting(), tensors(state), list[list[str]]()
    folders = [tmp_path / kind / "step-00000001" for kind in ("snapshots", "checkpoints")]

    def progress(what: str) -> None:
        seen.append([folder.parent.name for folder in folders if folder.is_dir()])

    work = checkpointing.save_work(tmp_path, state, task.spec, staging, None, progress, step=True, snapshot=True)
    train_step(state, task, second)
    assert staging.begun == 1 and not any(folder.is_dir() for folder in folders)
    work()
    assert [] in seen and ["snapshots"] in seen
    for folder, stem in zip(folders, (POWER, f"state/{POWER}"), strict=True):
        manifest.verify(folder)
        found = {f"{POWER} {name}": value for name, value in read_set(folder, stem)}
        assert found.keys() == {name for name in before if name.startswith(POWER)}
        assert unequal(found, {name: before[name] for name in found}) == []
        assert unequal(found, {name: tensors(state)[name] for name in found}) != []


def test_a_snapshot_alone_is_all_that_is_copied(tmp_path: Path) -> None:
    """The power-function averages and nothing else, in memory and on the disk."""
    state, task, _ = begin(small({"ema.power": (0.1,)}))
    staging = Counting()
    checkpointing.save_work(tmp_path, state, task.spec, staging, step=False, snapshot=True)()
    assert staging._block.numel() == aligned(state.averages.tracks[POWER].values)
    assert [path.name for path in tmp_path.iterdir()] == ["snapshots"]


def aligned(values: Sequence[Tensor]) -> int:
    """Bytes of host memory for copies of `values`."""
    return sum(-(-value.nbytes // 64) * 64 for value in values)


def test_the_loop_does_not_wait_for_a_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At step 2 both are due: step 3 is done while nothing of the snapshot is written, and the watchdog hears of its
    writing."""
    gate, real, passed, marks = threading.Event(), checkpointing.write_folder, list[bool](), list[tuple[str, str]]()

    def held(*given: Any) -> Path:
        passed.append(gate.wait(10))
        marks.append(("snapshot", "begins"))
        try:
            return real(*given)
        finally:
            marks.append(("snapshot", "ends"))

    monkeypatch.setattr(checkpointing, "write_folder", held)
    values = {"ema.power": (0.1,), "ema.snapshot_every": 2, "train.checkpoint_every": 2, "train.steps": 3}
    hooks = [Hook(3, lambda state: gate.set())]
    run = trainer(small({**values, "train.async_save": True}), tmp_path, hooks=hooks)
    monkeypatch.setattr(
        run.trainer.watchdog, "mark", lambda what: marks.append((threading.current_thread().name, what))
    )
    run.trainer.fit()
    assert passed == [True, True]
    inside = marks[marks.index(("snapshot", "begins")) : marks.index(("snapshot", "ends"))]
    assert ("saver", "save") in inside
    for kind in ("snapshots", "checkpoints"):
        assert sorted(path.name for path in (tmp_path / kind).iterdir()) == ["step-00000002", "step-00000003"]


# ---------------------------------------------------------------- host memory


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_reserved_memory_is_all_that_a_save_needs(kind: str, tmp_path: Path) -> None:
    """Made before the first step, for a state that saves later: not a byte too few, in the same place."""
    state, task, loader = begin(small({"optim.kind": kind, "ema.power": (0.1,), "ema.more": (0.9,)}))
    staging = Counting()
    work = checkpointing.reserve_work(state, staging)
    assert staging.makers == [] and staging._block.numel() == 0
    work()
    place, size = staging._block.data_ptr(), staging._block.numel()
    for batch in loader.from_step(0, 2):
        train_step(state, task, batch)
    checkpointing.save_work(tmp_path, state, task.spec, staging, snapshot=True)()
    assert (staging._block.data_ptr(), staging._block.numel()) == (place, size)
    assert len(staging.makers) == 1 and staging._used == size


@pytest.mark.parametrize("beside", [False, True])
def test_a_run_makes_its_memory_once_beside_the_steps(beside: bool, tmp_path: Path) -> None:
    values = {"train.async_save": beside, "train.checkpoint_every": 2, "train.steps": 4}
    run = trainer(small(values), tmp_path)
    staging = run.trainer.staging = Counting()
    run.trainer.fit()
    assert staging.makers == ["saver"] and staging.begun == 3


def test_memory_that_cannot_be_had_is_said_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A RunError of one line; what fits later is made."""
    real, staging = torch.empty, Staging()

    def refusing(*size: Any, **options: Any) -> Tensor:
        if size[0] == 6464:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator")
        return real(*size, **options)

    monkeypatch.setattr(torch, "empty", refusing)
    with pytest.raises(RunError, match=r"^a checkpoint needs 6,464 bytes of host memory; there is not enough$"):
        staging.begin([torch.ones(1600), torch.ones(())])
    staging.begin([torch.ones(5)])
    assert torch.equal(staging.copy(torch.ones(5)), torch.ones(5))


# ---------------------------------------------------------------- replicas


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_replicas_share_the_copying(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two replicas each makes memory for what it writes and copies that; the rest is named and empty. Together they
    copy every tensor once, bit for bit."""
    monkeypatch.setattr(save, "SHARD_BYTES", 1 << 12)
    monkeypatch.setattr(World, "run_on_all", lambda self, work, group: work())  # there is no other process to ask
    state, _, _ = begin(small({"optim.kind": kind, "ema.power": (0.1,)}))
    whole = checkpointing._sets(state)
    values = {f"{stem} {name}": value.detach() for stem, rows in whole.items() for name, _, value in rows()}
    stagings, copied = [], list[dict[str, Tensor]]()
    for rank in (0, 1):
        world, staging = World(torch.device("cpu"), rank=rank, size=2, replicate=2), Staging()
        sets = checkpointing._staged(whole, world, staging)
        state.world, reserved = world, Staging()
        checkpointing.reserve_work(state, reserved)()
        found = {f"{stem} {entry.name}": entry.part for stem, entries in sets.items() for entry in entries}
        assert {name: part.shape for name, part in found.items()} == {name: v.shape for name, v in values.items()}
        copied.append({name: part for name, part in found.items() if part.device.type != "meta"})
        assert staging._block.numel() == reserved._block.numel() == aligned(list(copied[-1].values()))
        stagings.append(staging)
    assert copied[0].keys().isdisjoint(copied[1])
    assert unequal(copied[0] | copied[1], values) == []
    assert sum(staging._block.numel() for staging in stagings) == aligned(list(values.values()))
    assert min(staging._block.numel() for staging in stagings) > 0.4 * aligned(list(values.values()))
