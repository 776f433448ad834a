"""Small data folders on the disk, and the small recipe over them, for tests of whole runs in process."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from smallrun import SIDE, small

from ldit.config.run import RunConfig


def make_folder(root: Path, names: Sequence[str] = ("a", "b", "c"), each: int = 4, side: int = SIDE) -> Path:
    """`each` images of noise in a folder for every class."""
    random = np.random.RandomState(1)
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(each):
            pixels = random.randint(0, 256, (side, side, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def make_idx(root: Path, count: int = 12, side: int = 28) -> Path:
    """MNIST's files: grey images of ten digits."""
    root.mkdir(parents=True)
    random = np.random.RandomState(2)
    images = random.randint(0, 256, (count, side, side)).astype(np.uint8)
    sizes = b"".join(n.to_bytes(4, "big") for n in images.shape)
    (root / "train-images-idx3-ubyte").write_bytes(bytes((0, 0, 8, 3)) + sizes + images.tobytes())
    labels = (np.arange(count) % 10).astype(np.uint8)
    (root / "train-labels-idx1-ubyte").write_bytes(bytes((0, 0, 8, 1)) + count.to_bytes(4, "big") + labels.tobytes())
    return root


def over(root: Path, changes: Mapping[str, Any] | None = None, flow: str = "") -> RunConfig:
    """The small recipe over a folder: two steps, one commit."""
    values = {"data.path": str(root), "train.steps": 2, "train.batch_size": 4, "data.max_per_class": 0}
    return small({**values, **(changes or {})}, flow)


@contextmanager
def said() -> Iterator[list[str]]:
    """What ldit's logger says from level INFO up."""
    lines: list[str] = []
    logger = logging.getLogger("ldit")
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
