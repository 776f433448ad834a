"""A process that dies at any call by which it changes the disk: the same command ends in the same bytes."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from calls import counted, in_child
from commands.encoding import contents, encode, job, write_images

from ldit.storage import manifest

DIED = 7


def dies_at(number: int, half: bool) -> Callable[[int, str], float | None]:
    """End the process, as SIGKILL would, at this call: before it, or for a write after half of its bytes."""

    def act(count: int, name: str) -> float | None:
        if count != number:
            return None
        if half and name == "write":
            return 0.5
        os._exit(DIED)

    return act


@pytest.mark.parametrize("half", [False, True])
def test_death_at_every_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, half: bool) -> None:
    """While the cache is begun, made and finished, with its held-out part. A cache in between is a true one."""
    write_images(tmp_path / "set")

    def run(out: Path) -> int:
        return 0 if encode(monkeypatch, job(tmp_path / "set", out, shard_size=6)) else 1

    with counted() as calls:
        assert run(tmp_path / "alone") == 0
    alone = contents(tmp_path / "alone")
    numbers = [n for n, name in enumerate(calls.made, 1) if not half or name == "write"]
    assert len(numbers) >= (9 if half else 60)
    for number in numbers:
        out = tmp_path / f"out{number}"

        def disturbed(out: Path = out, number: int = number) -> int:
            with counted(dies_at(number, half)):
                return run(out)

        assert in_child(disturbed) == DIED, f"call {number}"
        if (out / "manifest.json").exists():
            manifest.verify(out, [*manifest.read(out)])
        assert run(out) == 0
        assert contents(out) == alone, f"call {number}: {calls.made[number - 1]}"


def test_two_deaths_in_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second while the first one's remains are dealt with."""
    write_images(tmp_path / "set")

    def run(out: Path) -> int:
        return 0 if encode(monkeypatch, job(tmp_path / "set", out, shard_size=6)) else 1

    run(tmp_path / "alone")
    for first in (12, 25, 33, 47):
        for second in range(1, 14, 3):
            out = tmp_path / f"out{first}-{second}"
            for number in (first, second):

                def disturbed(out: Path = out, number: int = number) -> int:
                    with counted(dies_at(number, False)):
                        return run(out)

                assert in_child(disturbed) in (DIED, 0)
            assert run(out) == 0 and contents(out) == contents(tmp_path / "alone"), (first, second)


def test_a_finisher_that_was_killed_is_waited_for_by_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lock goes with it."""
    write_images(tmp_path / "set")
    out = tmp_path / "out"

    def killed() -> int:
        with counted(lambda number, name: os.kill(os.getpid(), signal.SIGKILL) if name == "replace" else None):  # type: ignore[func-returns-value]
            return 0 if encode(monkeypatch, job(tmp_path / "set", out)) else 1

    assert in_child(killed) == -signal.SIGKILL
    assert encode(monkeypatch, job(tmp_path / "set", out))
