"""Committed steps of a few kilobytes, written as a run writes them, and what must come back of them."""

import functools
from pathlib import Path

import torch
from models import weights_of
from torch import Tensor

from ldit.checkpoint.run import retire
from ldit.checkpoint.save import Entry, Sets, write_step
from ldit.config.model import ClassModelConfig
from ldit.config.spec import DDPMConfig, ModelSpec, PixelCodecConfig
from ldit.parallel.layout import Layout
from ldit.parallel.world import World
from ldit.storage.atomic import read_json
from ldit.storage.names import CHECKPOINTS, OPTIMIZER, TRAINER
from ldit.storage.shards import read_set

ALONE = World(torch.device("cpu"))
STEMS = ("model", "ema", OPTIMIZER)
MODEL = ClassModelConfig(
    dim=16, n_layers=1, n_heads=2, multiple_of=8, input_size=8, in_channels=3, num_classes=3, qk_norm="head"
)
SPEC = ModelSpec(MODEL, DDPMConfig(), PixelCodecConfig())
FILES = ("config.json", "ema.safetensors", "manifest.json", "model.safetensors", f"{OPTIMIZER}.safetensors", TRAINER)


def entries(tensors: dict[str, Tensor]) -> list[Entry]:
    """What a lone process holds of each tensor: all."""
    return [Entry(name, Layout(tuple(tensor.shape)), tensor) for name, tensor in tensors.items()]


@functools.cache
def content(step: int, salt: int = 0) -> dict[str, dict[str, Tensor]]:
    """Stem -> tensors of a step; other salt, other numbers. The optimiser's are of sizes that a file's buffer holds
    and does not hold."""
    seed = 1000 * salt + 2 * step
    state = {"step": torch.tensor(float(step)), "exp_avg": torch.full((3, 5000), float(seed)), "none": torch.empty(0)}
    return {"model": weights_of(MODEL, seed), "ema": weights_of(MODEL, seed + 1), OPTIMIZER: state}


def sets_of(tensors: dict[str, dict[str, Tensor]]) -> Sets:
    return {stem: entries(table) for stem, table in tensors.items()}


def save(run: Path, step: int, salt: int = 0, keep: int = 0, keep_every: int = 0) -> Path:
    """Commit a step, then remove those that are not to be kept."""
    folder = write_step(run, step, SPEC, sets_of(content(step, salt)), {"step": step, "salt": salt}, ALONE)
    retire(run, keep, keep_every)
    return folder


def stands(folder: Path, step: int, salt: int = 0) -> bool:
    """Whether the folder holds this step's tensors and record, bit for bit."""
    if read_json(folder / TRAINER) != {"step": step, "salt": salt}:
        return False
    for stem, wanted in content(step, salt).items():
        found = dict(read_set(folder, stem))
        if found.keys() != wanted.keys() or not all(_same_bits(found[name], wanted[name]) for name in wanted):
            return False
    return True


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def names_in(run: Path) -> set[str]:
    """Everything in the checkpoints folder, committed or left over."""
    return {path.name for path in (run / CHECKPOINTS).iterdir()}
