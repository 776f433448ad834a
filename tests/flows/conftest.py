"""A set of pictures to encode, the job over it with a codec that needs no weights, and two sets to compare."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flows.encoding import encode, pictures
from flows.evaluation import folder, noise


@pytest.fixture
def source(tmp_path: Path) -> Path:
    pictures(tmp_path / "set")
    return tmp_path / "set"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., bool]:
    return lambda one, codec=None, rank=0, world=1: encode(monkeypatch, one, codec, rank, world)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `a` (23 pictures) and `b` (31), and both as .npz."""
    base = tmp_path_factory.mktemp("evaluate")
    for name, found in (("a", noise(23, 0)), ("b", noise(31, 1, low=40))):
        folder(base / name, found)
        np.savez(base / f"{name}.npz", found)
        np.savez_compressed(base / f"{name}-packed.npz", arr_0=found)
    return base
