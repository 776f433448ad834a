"""Who writes which tensor of a set: neighbours together, equal bytes, few files, the same answer on every process."""

import json
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import steps
import torch
from torch import Tensor

from ldit.checkpoint import save
from ldit.checkpoint.save import Entry, deal
from ldit.parallel.exchange import ModelGroup
from ldit.parallel.layout import Layout
from ldit.parallel.world import World
from ldit.storage.shards import read_set, set_files, shard_name

CASES = 60


def entry(name: str, bytes_: int) -> Entry:
    return Entry(name, Layout((bytes_ // 4,)), torch.empty(0))


def random_entries(rng: random.Random) -> list[Entry]:
    largest = rng.choice([4, 400, 40_000])
    return [entry(f"{i}", 4 * rng.randrange(largest // 4 + 1)) for i in range(rng.randrange(1, 80))]


@pytest.fixture(params=[1000, 20_000, 1 << 30], ids=lambda size: f"shards of {size}")
def shard_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(save, "SHARD_BYTES", request.param)
    return int(request.param)


def test_the_bytes_of_an_entry_are_the_whole_tensors() -> None:
    """Whatever part of it this process holds."""
    whole = Entry("x", Layout((6, 4), shard=3), torch.empty(2, 4, dtype=torch.bfloat16))
    assert whole.bytes == 48
    assert Entry("x", Layout(()), torch.tensor(1.0)).bytes == 4
    assert Entry("x", Layout((0, 7)), torch.empty(0, 7)).bytes == 0


def test_no_more_files_than_bytes_or_processes_ask_for(shard_bytes: int) -> None:
    """ceil(bytes / SHARD_BYTES), at least one; a process writes one file of a set at most."""
    for case in range(CASES):
        entries = random_entries(random.Random(case))
        total = sum(e.bytes for e in entries)
        for processes in (1, 2, 3, 4, 7):
            files = len(set(deal(entries, processes)))
            assert files <= min(processes, max(1, -(-total // shard_bytes))), f"case {case}, {processes} processes"


def test_neighbours_go_together_in_order(shard_bytes: int) -> None:
    """So that a file holds whole blocks of the network and its name tells where in it."""
    for case in range(CASES):
        entries = random_entries(random.Random(case))
        for processes in (1, 2, 4, 7):
            owners = deal(entries, processes)
            assert len(owners) == len(entries) and all(0 <= owner < processes for owner in owners)
            assert all(one <= other for one, other in pairwise(owners)), f"case {case}"


def test_files_are_of_about_equal_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each within one tensor of the mean."""
    monkeypatch.setattr(save, "SHARD_BYTES", 1)
    for case in range(CASES):
        entries = random_entries(random.Random(case))
        total, largest = sum(e.bytes for e in entries), max(e.bytes for e in entries)
        for processes in (2, 3, 4, 7):
            files = min(processes, max(1, total))
            written: Counter[int] = Counter()
            for e, owner in zip(entries, deal(entries, processes), strict=True):
                written[owner] += e.bytes
            for owner in range(processes):
                assert abs(written[owner] - total / files) <= largest, f"case {case}, process {owner} of {processes}"


def test_few_files_are_spread_over_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two files of eight processes are written by the first of either half: on two machines rather than on one."""
    monkeypatch.setattr(save, "SHARD_BYTES", 4000)
    entries = [entry(f"{i}", 400) for i in range(20)]
    assert deal(entries, 8) == [0] * 10 + [4] * 10
    assert deal(entries, 1) == [0] * 20
    monkeypatch.setattr(save, "SHARD_BYTES", 1)
    assert deal(entries, 4) == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 5


@pytest.mark.parametrize("sizes", [[], [0], [0, 0, 0], [4], [0, 4, 0]], ids=str)
def test_sets_of_almost_nothing(sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save, "SHARD_BYTES", 1)
    assert len(deal([entry(f"{i}", size) for i, size in enumerate(sizes)], 4)) == len(sizes)


# ---------------------------------------------------------------- what four processes write, one after the other


def four(rank: int) -> World:
    """One of four processes that each hold everything: replicas that need no exchange."""
    return World(torch.device("cpu"), rank=rank, size=4, replicate=4, saving_model_group=ModelGroup())


def written_by_four(folder: Path, stem: str, tensors: dict[str, Tensor]) -> None:
    """Every process's files, and the first one's index."""
    entries = steps.entries(tensors)
    (folder / stem).parent.mkdir(exist_ok=True)
    for rank in range(4):
        records, fault = save._write_set(folder, stem, entries, four(rank), lambda what: None)
        assert fault is None
        for name, record in records.items():
            assert record.size == (folder / name).stat().st_size
    save._write_index(folder, stem, entries, 4)


@pytest.mark.parametrize(("shard_size", "files"), [(1 << 30, 1), (40_000, 2), (1, 4)])
@pytest.mark.parametrize("stem", ["ema", "state/optimizer"])
def test_what_four_processes_write_is_the_set(
    tmp_path: Path, stem: str, shard_size: int, files: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each its own files, an index where there are several, numbered without gaps; together every tensor once."""
    monkeypatch.setattr(save, "SHARD_BYTES", shard_size)
    tensors = {f"layers.{i}.weight": torch.full((25, 40), float(i)) for i in range(18)}
    written_by_four(tmp_path, stem, tensors)
    assert set_files(tmp_path, stem) == [shard_name(stem, i, files) for i in range(files)]
    found = list(read_set(tmp_path, stem))
    assert sorted(name for name, _ in found) == sorted(tensors)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in found)
    index = tmp_path / f"{stem}.safetensors.index.json"
    assert index.is_file() == (files > 1)
    if files > 1:
        assert json.loads(index.read_text())["metadata"] == {"total_size": 72_000}
