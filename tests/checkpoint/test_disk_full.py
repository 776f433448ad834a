"""C5: a disk that is full, refuses or fails costs the step being saved and nothing else, and the message says what
a checkpoint needs."""

import errno
import os
import random
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import steps
from calls import counted, in_child
from counts import count

from ldit.checkpoint.run import latest_valid_step, step_folder
from ldit.errors import RunError
from ldit.storage import manifest

NEEDED = sum(entry.bytes for entries in steps.sets_of(steps.content(2)).values() for entry in entries)
FULL = {errno.ENOSPC: "No space left on device", errno.EDQUOT: "Disk quota exceeded", errno.EFBIG: "File too large"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with step 1."""
    steps.save(tmp_path / "run", 1)
    return tmp_path / "run"


def refused(run: Path) -> str:
    """Save step 2, expect one line of RunError, return it."""
    with pytest.raises(RunError) as caught:
        steps.save(run, 2, keep=1)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and message.startswith(f"{step_folder(run, 2)} was not written: "), message
    assert "earlier checkpoints are intact" in message
    return message


def intact(run: Path) -> None:
    """Step 1 as it was, nothing of step 2, without a sweep."""
    assert steps.names_in(run) == {"step-00000001"}
    assert latest_valid_step(run) == (1, step_folder(run, 1))
    assert steps.stands(step_folder(run, 1), 1)


def in_bytes(message: str, fault: int) -> None:
    """The message says which limit was met, what a checkpoint needs, and what is free."""
    assert FULL.get(fault, "no space left").lower() in message.lower(), message
    before, _, after = message.partition(f": a checkpoint needs {NEEDED:,} bytes, ")
    assert before and after.split(" are free")[0].replace(",", "").isdigit(), message


def refuses(number: int, fault: int, name: str, half: bool, lasting: bool = True) -> Callable[[int, str], float | None]:
    """From the n-th call of this name on the disk gives `fault`; its first write may still take half of the bytes."""
    seen = {"calls": 0}

    def act(at: int, made: str) -> float | None:
        if made == name:
            seen["calls"] += 1
        if seen["calls"] < number or made not in (name, "half write") or (seen["calls"] > number and not lasting):
            return None
        if half and made == "write" and seen["calls"] == number:
            return 0.5
        raise OSError(fault, os.strerror(fault))

    return act


def calls_of_a_save(folder: Path, name: str) -> int:
    step_folder(folder, 1).parent.mkdir(parents=True, exist_ok=True)  # as in the run: making it is not counted
    with counted() as calls:
        steps.save(folder, 1)
    return calls.made.count(name)


def limited(run: Path, limit: int) -> int:
    """In a child: a save under RLIMIT_FSIZE. 0 = refused in the right words."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    in_bytes(refused(run), errno.EFBIG)
    return 0


def file_size_limit(run: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's own refusal, at any size below the largest file's."""
    largest = max((step_folder(run, 1) / name).stat().st_size for name in steps.FILES)
    limit = rng.randrange(largest)
    assert in_child(lambda: limited(run, limit)) == 0, f"limit {limit}"


def full_at_a_write(run: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk, or the user's share of it, is full at the k-th write, or in its middle."""
    fault = rng.choice([errno.ENOSPC, errno.EDQUOT])
    number = rng.randint(1, calls_of_a_save(run.parent / "other", "write"))
    with counted(refuses(number, fault, "write", rng.random() < 0.5)):
        in_bytes(refused(run), fault)


def no_room(run: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known before the first byte: nothing is written at all."""
    free = rng.randrange(NEEDED)
    with monkeypatch.context() as patch, counted() as calls:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        message = refused(run)
    in_bytes(message, 0)
    assert f"{free:,} are free" in message and "write" not in calls.made


def failing_sync(run: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that may not be on the disk are not committed; the last fsync is that of the parent, after the rename."""
    number = rng.randint(1, calls_of_a_save(run.parent / "other", "fsync") - 1)
    fault = rng.choice([errno.EIO, errno.ENOSPC])
    with counted(refuses(number, fault, "fsync", False)):
        message = refused(run)
    assert os.strerror(fault) in message
    if fault == errno.ENOSPC:
        in_bytes(message, fault)


FAULTS: list[Callable[..., Any]] = [file_size_limit, full_at_a_write, no_room, failing_sync]


@pytest.mark.parametrize("case", range(count(12, 60)))
def test_c5_a_disk_that_refuses(run: Path, case: int, monkeypatch: pytest.MonkeyPatch) -> None:
    FAULTS[case % len(FAULTS)](run, random.Random(case), monkeypatch)
    intact(run)
    steps.save(run, 2)
    manifest.verify(step_folder(run, 2))


def test_c5_every_write_and_every_sync_may_be_the_one(run: Path) -> None:
    """Not a sample: the first write of each file and the last, the folder's fsync too."""
    for name, fault in (("write", errno.ENOSPC), ("fsync", errno.EIO)):
        total = calls_of_a_save(run.parent / name, name) - (name == "fsync")
        for number in range(1, total + 1):
            with counted(refuses(number, fault, name, False)):
                refused(run)
            assert steps.names_in(run) == {"step-00000001"}, f"{name} {number}"
    intact(run)


@pytest.mark.parametrize("name", ["open", "mkdir", "rename"])
def test_c5_other_refusals(run: Path, name: str) -> None:
    """A file system that turned read-only. (Clean-up opens folders too: that much still works.)"""
    with counted(refuses(1, errno.EROFS, name, False, lasting=name != "open")):
        assert os.strerror(errno.EROFS) in refused(run)
    intact(run)
