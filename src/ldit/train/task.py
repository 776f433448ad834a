"""What is trained. A Task gives the Trainer a network and per-sample losses; diffusion is the first one."""

from typing import Protocol

import torch
from torch import Tensor, nn

from ldit.config.run import RunConfig
from ldit.config.sections import ObjectiveConfig
from ldit.config.spec import ModelSpec
from ldit.data.batch import Batch
from ldit.diffusion.build import Process, build_process
from ldit.diffusion.ddpm import DDPM
from ldit.diffusion.times import logit_normal, shifted, uniform_index
from ldit.nn.build import build_model
from ldit.nn.dit import init_weights
from ldit.rng import generator, normal, uniform

HELDOUT_BUCKETS = 4


class Task(Protocol):
    """The Trainer's view of what it trains."""

    spec: ModelSpec

    def build(self) -> nn.Module:
        """The network, initialised."""
        ...

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Per-sample values (B,); "loss" is what is minimised."""
        ...

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Per-sample values of held-out pictures, by name; a name may cover only some of the samples."""
        ...


class DiffusionTask:
    """Class-conditional diffusion. Noise, time and label dropout of a sample depend on (seed, its position) alone."""

    def __init__(self, config: RunConfig, spec: ModelSpec) -> None:
        self.spec = spec
        self.seed = config.train.seed
        self.objective: ObjectiveConfig = config.objective
        self.process: Process = build_process(spec.process)

    def build(self) -> nn.Module:
        model = build_model(self.spec.model)
        init_weights(model, lambda name: generator(self.seed, "init", 0, name))
        return model

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        t = self._times(batch)
        return self._run(model, batch, self._drop(batch), t, "noise")

    def evaluate(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Squared error of eps at evenly spread times with fixed noise: overall and by quarter of the time range."""
        share = torch.tensor([(position + 0.5) * 0.618033988749895 % 1.0 for position in batch.positions])
        t = uniform_index(share, self.process.steps) if isinstance(self.process, DDPM) else share
        error = self.process.heldout_error(self._run(model, batch, batch.labels, t, "heldout"), t)
        quarter = (share * HELDOUT_BUCKETS).long()
        buckets = {f"eps_mse_q{q + 1}": error[quarter == q] for q in range(HELDOUT_BUCKETS)}
        return {"eps_mse": error, **buckets}

    def _run(self, model: nn.Module, batch: Batch, labels: Tensor, t: Tensor, stream: str) -> dict[str, Tensor]:
        device = next(model.parameters()).device
        dtype = next(model.parameters()).dtype
        shape = tuple(batch.images.shape[1:])
        noise = torch.stack([normal(shape, self.seed, stream, 0, position) for position in batch.positions])

        def predict(x_t: Tensor, time: Tensor) -> Tensor:
            return model(x_t.to(dtype), time, labels.to(device))

        return self.process.losses(predict, batch.images.to(device), t.to(device), noise.to(device))

    def _times(self, batch: Batch) -> Tensor:
        if isinstance(self.process, DDPM):
            u = torch.tensor([uniform(self.seed, "time", 0, position) for position in batch.positions])
            return uniform_index(u, self.process.steps)
        draws = torch.cat([normal((1,), self.seed, "time", 0, position) for position in batch.positions])
        return shifted(logit_normal(draws, self.objective.time_mean, self.objective.time_std), self.process.shift)

    def _drop(self, batch: Batch) -> Tensor:
        """Labels with the null class in place of a share of them."""
        null, share = self.spec.model.null_class, self.spec.model.class_dropout_prob  # type: ignore[union-attr]
        if null is None:
            return batch.labels
        drawn = torch.tensor([uniform(self.seed, "drop", 0, position) for position in batch.positions])
        return torch.where(drawn < share, null, batch.labels)
