"""Tiny training runs for tests: state, task and loader without a run directory."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ldit.codecs.conditioners import TextConditioner
from ldit.config.model import TextModelConfig
from ldit.config.recipes.registry import recipe
from ldit.config.run import RunConfig
from ldit.config.spec import ClassConditionerConfig, ModelSpec
from ldit.data.loader import Loader
from ldit.data.samples import Captioned, Samples
from ldit.data.source import open_data
from ldit.parallel.world import World
from ldit.precision import COMPUTE
from ldit.rng import generator
from ldit.training.state import TrainState
from ldit.training.step import Outcome, fill_fresh, new_state, train_step
from ldit.training.tasks.diffusion import DiffusionTask

ALONE = World(torch.device("cpu"))


def tiny(**train: Any) -> RunConfig:
    """The tiny recipe with other values in its train section."""
    config = recipe("tiny-cpu")
    return replace(config, train=replace(config.train, **train))


def random_features(model: TextModelConfig) -> Any:
    """Features of texts that depend on the text alone, of 2 to 6 tokens each."""

    def features(texts: list[str]) -> list[Tensor]:
        own = [generator(0, "text", 0, text) for text in texts]
        return [
            torch.randn(2 + len(text) % 5, model.cap_feat_dim, generator=g) for text, g in zip(texts, own, strict=True)
        ]

    return features


def started(config: RunConfig, world: World = ALONE) -> tuple[TrainState, DiffusionTask, Loader]:
    """A fresh run's state, task and loader."""
    data, _ = open_data(config.data.path, config.data.image_size, config.data.heldout, config.data.max_per_class)
    spec = ModelSpec(config.model, config.process, config.codec, ClassConditionerConfig(data.names))
    samples: Samples = data
    if isinstance(config.model, TextModelConfig):
        samples, captions = Captioned(data), data.captions()
        conditioner = TextConditioner(captions.texts, "", config.text.dropout, random_features(config.model), 6)
        task = DiffusionTask(config, spec, conditioner=conditioner, captions=captions)
    else:
        task = DiffusionTask(config, spec)
    state = new_state(config, task, world)
    fill_fresh(state, task)
    share = (world.data_part, world.data_parts)
    return state, task, Loader(samples, config.train.batch_size, config.train.seed, False, 0, *share)


def after(config: RunConfig, steps: int, world: World = ALONE, look_every: int = 0) -> tuple[TrainState, list[Outcome]]:
    """The state after `steps` steps, and their outcomes. With `look_every` the average is shown to a pass without
    gradients between steps, as hooks do; it must leave no trace."""
    state, task, loader = started(config, world)
    outcomes = []
    for batch in loader.from_step(0, steps):
        outcomes.append(train_step(state, task, batch))
        if look_every and state.step % look_every == 0:
            with state.weights.swapped_in(state.averages.main) as model, torch.no_grad():
                task.evaluate(model, batch, world.device, COMPUTE[config.train.precision])
    return state, outcomes


def flat(tensors: list[Any]) -> Tensor:
    """All numbers in one row."""
    return torch.cat([t.detach().flatten() for t in tensors])
