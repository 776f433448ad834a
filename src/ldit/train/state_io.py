"""TrainState <-> named tensors: what a committed step holds beyond the weights."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldit.checkpoint.run import read_state, save_step
from ldit.config.spec import ModelSpec
from ldit.errors import SourceError
from ldit.train.step import TrainState

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def save(run: Path, state: TrainState, spec: ModelSpec, keep: int, data: dict[str, Any] | None = None) -> Path:
    """Commit the state as RUN/checkpoints/step-…; `data` is the record of the training set."""
    record = {"step": state.step, "images": state.step * state.config.train.batch_size}
    spec = replace(spec, training=record)
    weights = state.master.state_dict().items()
    trainer = {**record, "data": data}
    return save_step(run, state.step, spec, weights, state.ema_tensors(), _optimizer_tensors(state), trainer, keep)


@torch.no_grad()
def restore(folder: Path, state: TrainState) -> None:
    """Fill `state` from a verified step folder, bit for bit."""
    weights, ema, optimizer, record = read_state(folder)
    own = state.master.state_dict()
    for name, value in weights:
        _copy(own, name, value, folder)
    averaged = dict(zip(state.names, state.ema.average, strict=True))
    for name, value in ema:
        if name in averaged:
            _copy(averaged, name, value, folder)
    parameters = dict(zip(state.names, state.parameters, strict=True))
    for key, value in optimizer:
        moment, _, name = key.partition(".")
        if name not in parameters:
            raise SourceError(f"{folder}: optimiser state of unknown parameter {name}")
        parameter = parameters[name]
        state.optimizer.state[parameter][moment] = value.to(parameter.device, copy=True)
    state.step = record["step"]
    state.sync_compute()


def _optimizer_tensors(state: TrainState) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in zip(state.names, state.parameters, strict=True):
        for moment in _MOMENTS:
            if moment in state.optimizer.state[parameter]:
                yield f"{moment}.{name}", state.optimizer.state[parameter][moment]


def _copy(table: dict[str, Tensor], name: str, value: Tensor, folder: Path) -> None:
    if name not in table or table[name].shape != value.shape:
        raise SourceError(f"{folder}: {name} does not fit the model")
    table[name].copy_(value)
