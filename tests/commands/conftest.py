"""A set of images to encode, and the job over it with a codec that needs no weights."""

from collections.abc import Callable
from pathlib import Path

import pytest
from commands.encoding import encode, write_images


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_images(tmp_path / "set")
    return tmp_path / "set"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., bool]:
    return lambda one, codec=None, rank=0, world=1: encode(monkeypatch, one, codec, rank, world)
