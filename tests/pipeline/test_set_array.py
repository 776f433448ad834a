"""How an array looks at the folder of its parts: rarely, and never so that work is done twice or lost."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from ldit.pipeline.sets import array as set_array
from ldit.pipeline.sets.array import ArrayWriter
from ldit.pipeline.sets.folder import Block
from ldit.pipeline.sets.job import Labels


class Parts:
    """Parts of an array of 300 blocks, by a process and others; `clock` is the time, `looks` the listings so far."""

    def __init__(self, out: Path, patch: pytest.MonkeyPatch) -> None:
        self.clock, self.looks = 0.0, 0
        self.files = ArrayWriter(out, {"num": 300, "batch_size": 1, "size": [1, 1]}, Labels(None, (), 0))
        assert self.files.begin()
        for name in ("listdir", "scandir"):
            patch.setattr(os, name, partial(self._counted, getattr(os, name)))
        patch.setattr(set_array.time, "monotonic", lambda: self.clock)

    def _counted(self, real: Any, *arguments: Any) -> Any:
        self.looks += 1
        return real(*arguments)

    def path(self, number: int) -> Path:
        return self.files.place / f"block-{number:06d}.{number:064x}.npy"

    def there(self) -> list[int]:
        return [number for number in range(300) if self.files.has_block(number)]

    def write(self, number: int) -> None:
        block = Block(range(number, number + 1), torch.zeros(1, 3, 1, 1, dtype=torch.uint8), ())
        self.files.write(number, block)


def test_one_look_at_the_folder_serves_all_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a pass over them, whether they stand or not, and at the end."""
    parts = Parts(tmp_path / "set.npz", monkeypatch)
    for number in range(0, 300, 2):
        parts.path(number).touch()
    assert parts.there() == list(range(0, 300, 2)) and parts.looks == 1
    for number in range(300):
        parts.path(number).touch()
    assert not parts.files.finish() and parts.looks == 2  # the first part is empty, and goes
    assert not parts.files.finish() and parts.looks == 3


def test_what_others_made_and_removed_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that was removed at once, a new one after two seconds; before one is put in its place at once."""
    parts = Parts(tmp_path / "set.npz", monkeypatch)
    parts.path(5).touch()
    assert parts.there() == [5]
    parts.path(7).touch()
    parts.clock += 1.9
    assert parts.there() == [5]
    parts.path(5).unlink()
    parts.path(6).touch()
    assert not parts.files.has_block(5) and parts.files.has_block(6)
    parts.path(8).touch()
    parts.write(8)
    parts.write(9)
    looks = parts.looks
    assert parts.there() == [6, 7, 8, 9] and parts.looks == looks
    assert len(list(parts.files.place.glob("block-*"))) == 4 and parts.path(8).exists()
    parts.path(10).touch()
    parts.clock += 2.1
    assert parts.there() == [6, 7, 8, 9, 10]
