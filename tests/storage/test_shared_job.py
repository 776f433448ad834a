"""The protocol of shared folders, by the smallest job there can be: blocks of numbers, joined into one file."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ldit.errors import RequestError, RunError
from ldit.storage.locks import hold
from ldit.storage.shared_job import SharedJob, brief, compare, cut

NUM = 10


class Numbers(SharedJob[str]):
    """OUT/joined of OUT/block-0 …; `made` are the numbers of the blocks that were written here."""

    ignored = ("name",)

    def __init__(self, out: Path, size: int = 3, name: str = "one") -> None:
        super().__init__(out, out, "job.json", {"size": size, "name": name}, cut(NUM, size))
        self.made: list[int] = []

    def path(self, number: int) -> Path:
        return self.place / f"block-{number}"

    def is_complete(self) -> bool:
        return (self.out / "joined").exists()

    def has_block(self, number: int) -> bool:
        return self.path(number).exists()

    def count_done(self) -> int:
        return sum(len(rows) for number, rows in enumerate(self.blocks) if self.has_block(number))

    def bytes_needed(self, items: int) -> int:
        return 2 * items

    def _read_description(self) -> Any:
        return json.loads(self.description_file.read_text()) if self.description_file.exists() else None

    def _write_description(self, path: Path) -> None:
        path.write_text(json.dumps(self.description))

    def _adopt(self, begun: Any) -> None:
        self.description = begun

    def _write(self, number: int, block: str) -> None:
        self._put(self.path(number), lambda path: path.write_text(block))
        self.made.append(number)

    def _complete(self) -> bool:
        blocks = [self.path(number) for number in range(len(self.blocks))]
        if not all(path.exists() for path in blocks):
            return False
        if bad := [path for path in blocks if not path.read_text()]:
            bad[0].unlink()
            return False
        text = "".join(path.read_text() for path in blocks)
        self._put(self.out / "joined", lambda path: path.write_text(f"{self.description['name']}:{text}"))
        return True

    def _sweep(self, has_locks: bool) -> None:
        self._remove_dead()
        for path in [self.description_file, *self.place.glob("block-*")]:
            path.unlink(missing_ok=True)

    def run(self, rank: int = 0, world: int = 1) -> bool:
        def make(numbers: Iterator[int]) -> None:
            for number in numbers:
                self.write(number, "".join(map(str, self.blocks[number])))

        return not self.begin() or self.make_share(rank, world, make)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_each_process_makes_its_blocks_and_the_last_one_completes(tmp_path: Path, world: int) -> None:
    """Rank r of n makes blocks r, r + n, …; what is left is the result alone."""
    jobs = [Numbers(tmp_path / "out") for _ in range(world)]
    done = [jobs[rank].run(rank, world) for rank in reversed(range(world))]
    assert done == [False] * (world - 1) + [True]
    assert [job.made for job in jobs] == [list(range(rank, 4, world)) for rank in range(world)]
    assert os.listdir(tmp_path / "out") == ["joined"] and (tmp_path / "out/joined").read_text() == "one:0123456789"
    again = Numbers(tmp_path / "out")
    assert again.run() and not again.made


def test_another_job_is_refused_and_an_ignored_key_keeps_its_first_value(tmp_path: Path) -> None:
    assert not Numbers(tmp_path).run(0, 2)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(RequestError, match="made with size 3, this command has 4; choose another place"):
        Numbers(tmp_path, size=4).run()
    assert sorted(os.listdir(tmp_path)) == before
    assert Numbers(tmp_path, name="two").run()
    assert (tmp_path / "joined").read_text() == "one:0123456789"


def test_a_block_that_turns_out_to_be_damaged_is_made_again(tmp_path: Path) -> None:
    """Its process makes it in a second round; a single process that loses one twice says so."""
    assert not Numbers(tmp_path).run(0, 2)
    (tmp_path / "block-0").write_text("")
    job = Numbers(tmp_path)
    assert job.run() and job.made == [1, 3, 0]

    class Losing(Numbers):
        def _complete(self) -> bool:
            self.path(0).unlink()
            return False

    with pytest.raises(RunError, match="a block disappeared"):
        Losing(tmp_path / "other").run()


def test_work_folders_of_the_dead_go_and_of_the_living_stay(tmp_path: Path) -> None:
    living, dead = tmp_path / ".work-00000000", tmp_path / ".work-11111111"
    for folder in (living, dead):
        folder.mkdir()
        (folder / "half").touch()
    lock = hold(living)
    job = Numbers(tmp_path)
    assert job.begin() and living.exists() and not dead.exists()
    job.close()
    assert {path.name for path in tmp_path.iterdir()} == {living.name, "job.json"}
    os.close(lock)


def test_who_writes_while_others_complete_the_job_ends_well(tmp_path: Path) -> None:
    """Its work folder is gone; nothing is changed, nothing raised."""
    late = Numbers(tmp_path)
    assert late.begin()
    assert Numbers(tmp_path).run()
    for path in tmp_path.glob(".work-*"):
        path.rmdir()  # as jobs do whose whole folder goes
    late.write(0, "other")
    assert late.finish() and (tmp_path / "joined").read_text() == "one:0123456789"
    late.close()


def test_differences_are_named_in_one_line(tmp_path: Path) -> None:
    """Nested keys by their path, fingerprints by twelve digits, long values cut; ignored keys may differ."""
    old = {"a": {"b": 1, "c": "x"}, "d": "0" * 64, "long": [7] * 100}
    compare(tmp_path, old, {**old, "a": {"b": 1, "c": "y"}}, ["a.c"])
    with pytest.raises(RequestError, match=r"made with a\.b 1, this command has None"):
        compare(tmp_path, old, {**old, "a": {"c": "x"}})
    with pytest.raises(RequestError, match=f"made with d {'0' * 12}, this command has {'1' * 12};"):
        compare(tmp_path, old, {**old, "d": "1" * 64})
    assert len(brief([7] * 100)) == 81
