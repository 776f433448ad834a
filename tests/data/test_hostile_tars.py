"""D4: archives made to harm their reader are refused in a line, at once, in little memory, and nothing is written."""

import os
import random
import sys
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from counts import count

sys.path.insert(0, str(Path(__file__).parent))
import hostile_tars

from ldit.data.formats.tar_index import read_tars
from ldit.data.formats.tars import TarImages
from ldit.data.images.decoding import Decoding
from ldit.errors import DataError

CASES = range(count(len(hostile_tars.KINDS) + 1, 500))
BATCHES = 4
MEMORY = 100 << 20
SECONDS = 5.0
CHANGES = {
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.truncate",
    "os.chmod",
    "os.utime",
}
_heard: list[str] | None = None


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    """Hooks cannot be removed: this one serves all tests, and hears nothing outside of `unwritten`."""
    if _heard is None:
        return
    if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
        _heard.append(f"open {arguments[0]}")
    elif event in CHANGES:
        _heard.append(event)


sys.addaudithook(_hear)


@contextmanager
def unwritten() -> Iterator[None]:
    """Fails when the block changes anything on the disk."""
    global _heard
    _heard = []
    try:
        yield
        assert _heard == []
    finally:
        _heard = None


def refused(path: Path) -> str:
    """The line by which opening `path` is refused, in bounded time and memory."""
    tracemalloc.start()
    began = time.process_time()
    try:
        with unwritten(), pytest.raises(DataError) as caught:
            read_tars(path)
        assert time.process_time() - began < SECONDS
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()
    line = str(caught.value)
    assert line.isprintable() and len(line) < 1100
    return line


@pytest.mark.parametrize("batch", range(BATCHES))
def test_d4_hostile_archives(batch: int, tmp_path: Path) -> None:
    assert len(CASES) >= 30
    path = tmp_path / "shard-000.tar"
    for case in CASES[batch::BATCHES]:
        kind, said = hostile_tars.make(case, path)
        try:
            line = refused(path)
        except BaseException as error:
            raise AssertionError(f"case {case}, {kind}") from error
        assert path.name in line and said in line, (case, kind, said, line)
        assert "has no label" not in line, (case, kind)  # another reason, which would hide that its own was missed
        assert list(tmp_path.iterdir()) == [path]


def test_d4_the_archives_would_be_sound_without_their_fault(tmp_path: Path) -> None:
    """So that it is the fault that is refused."""
    path = tmp_path / "a.tar"
    for seed in range(10):
        rng = random.Random(seed)
        hostile_tars.write(path, [*hostile_tars.good(rng), *hostile_tars.good(rng, 2, "after"), hostile_tars.END])
        data = TarImages(path, 4, Decoding())
        assert data.names == ("0", "1") and data[len(data) - 1][1] == 1


def test_d4_damaged_bits_end_in_a_line_or_a_sound_set(tmp_path: Path) -> None:
    path, seen = tmp_path / "a.tar", set()
    for case in range(count(100, 2000)):
        rng = random.Random(case)
        whole = bytearray(b"".join(hostile_tars.good(rng)) + hostile_tars.END)
        for _ in range(rng.choice([1, 1, 3, 30])):
            at = rng.randrange(len(whole))
            whole[at] = rng.choice([whole[at] ^ (1 << rng.randrange(8)), 0, 255, 0x80])
        path.write_bytes(whole)
        try:
            data = TarImages(path, 4, Decoding())
            for index in range(len(data)):
                assert data[index][0].shape == (4, 4, 3)
            said = "sound"
        except DataError as error:
            said = str(error)
        assert said == "sound" or str(path) in said, case
        seen.add("sound" if said == "sound" else "refused")
    assert seen == {"sound", "refused"}


def test_d4_cases_are_the_same_every_time(tmp_path: Path) -> None:
    one, two = tmp_path / "one.tar", tmp_path / "two.tar"
    for case in range(len(hostile_tars.KINDS) + 1):
        made = [hostile_tars.make(case, path) for path in (one, two)]
        assert made[0] == made[1] and one.stat().st_size == two.stat().st_size
        assert one.stat().st_size > 64 << 20 or one.read_bytes() == two.read_bytes()


def test_d4_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.tar"
    os.mkfifo(pipe)
    assert refused(tmp_path) == f"{pipe} is not a file"
    pipe.unlink()
    pipe.mkdir()
    assert refused(tmp_path) == f"{pipe} is not a file"
    pipe.rmdir()
    pipe.symlink_to(pipe)
    assert "pipe.tar" in refused(tmp_path)
    pipe.unlink()
    pipe.touch()
    assert refused(tmp_path) == f"{pipe} is empty"
    pipe.write_bytes(hostile_tars.END)
    assert refused(tmp_path) == f"no images in {tmp_path}"
