"""What a process can be started with: it stalls for ever at one place, or fails there, or writes its checkpoints in
many files."""

import time
from collections.abc import Callable
from typing import Any

import torch

from ldit.checkpoint import save
from ldit.data import loader
from ldit.storage import shards as sets
from ldit.training.tasks import diffusion as task


def _for_ever(*arguments: Any) -> Any:
    while True:
        time.sleep(3600)


def stall_in_data(step: int) -> None:
    """No batch comes for `step`."""
    sound = loader.Loader.from_step

    def from_step(self: loader.Loader, first: int, last: int, offset: int = 0) -> Any:
        for number, batch in enumerate(sound(self, first, last, offset), first + 1):
            if number == step:
                _for_ever()
            yield batch

    loader.Loader.from_step = from_step  # type: ignore[method-assign, assignment]


def stall_in_loss(step: int) -> None:
    """The forward pass of `step` does not end."""
    sound, count = task.DiffusionTask.losses, [0]

    def losses(*arguments: Any) -> dict[str, torch.Tensor]:
        count[0] += 1
        return _for_ever() if count[0] == step else sound(*arguments)

    task.DiffusionTask.losses = losses  # type: ignore[method-assign, assignment]


def stall_in_save(tensors: int) -> None:
    """The disk takes `tensors` tensors and hangs."""
    sound, count = sets.ShardWriter.add, [0]

    def add(self: sets.ShardWriter, tensor: torch.Tensor) -> None:
        count[0] += 1
        return _for_ever() if count[0] > tensors else sound(self, tensor)

    sets.ShardWriter.add = add  # type: ignore[method-assign]


def fail_in_loss(step: int) -> None:
    """The forward pass of `step` raises."""
    sound, count = task.DiffusionTask.losses, [0]

    def losses(*arguments: Any) -> dict[str, torch.Tensor]:
        count[0] += 1
        if count[0] == step:
            raise RuntimeError("injected")
        return sound(*arguments)

    task.DiffusionTask.losses = losses  # type: ignore[method-assign, assignment]


def small_files(size: int) -> None:
    """Checkpoints are split over files of `size` bytes, so that every process writes. To be asked of all alike."""
    save.SHARD_BYTES = size


FAULTS: dict[str, Callable[[int], None]] = {
    "data": stall_in_data, "loss": stall_in_loss, "save": stall_in_save, "fail": fail_in_loss, "files": small_files,
}  # fmt: skip
