"""Batches by step, made ahead on one thread (Pillow and numpy release the interpreter while they work)."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from ldit.data.batch import Batch
from ldit.data.image_folder import ImageFolder
from ldit.data.order import EpochOrder
from ldit.rng import uniform

AHEAD = 2


def load_batch(data: ImageFolder, positions: Sequence[int], indices: Sequence[int], flip_seed: int | None) -> Batch:
    """The samples `indices`; with `flip_seed`, half of them mirrored, each by its own position's random number."""
    pictures, labels = [], []
    for position, index in zip(positions, indices, strict=True):
        picture, label = data[index]
        if flip_seed is not None and uniform(flip_seed, "flip", 0, position) < 0.5:
            picture = picture[:, ::-1]
        pictures.append(picture)
        labels.append(label)
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    return Batch(images.contiguous(), torch.tensor(labels), tuple(positions))


class Loader:
    """The batches of a run; step b is the same batch whoever asks for it and whenever."""

    def __init__(self, data: ImageFolder, batch_size: int, seed: int, flip: bool) -> None:
        self.data, self.batch_size = data, batch_size
        self.order = EpochOrder(len(data), seed)
        self.flip_seed = seed if flip else None

    def from_step(self, first: int, last: int) -> Iterator[Batch]:
        """Batches of steps first … last-1, in order."""
        with ThreadPoolExecutor(1, thread_name_prefix="loader") as pool:
            pending: list[Future[Batch]] = []
            upcoming = iter(range(first, last))
            while True:
                while len(pending) < AHEAD and (step := next(upcoming, None)) is not None:
                    positions, indices = self.order.batch(step, self.batch_size)
                    pending.append(pool.submit(load_batch, self.data, positions, indices, self.flip_seed))
                if not pending:
                    return
                yield pending.pop(0).result()
