"""Two sets to compare."""

from pathlib import Path

import numpy as np
import pytest
from eval.evaluation import folder, noise


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `a` (23 images) and `b` (31), and both as .npz."""
    base = tmp_path_factory.mktemp("evaluate")
    for name, found in (("a", noise(23, 0)), ("b", noise(31, 1, low=40))):
        folder(base / name, found)
        np.savez(base / f"{name}.npz", found)
        np.savez_compressed(base / f"{name}-packed.npz", arr_0=found)
    return base
