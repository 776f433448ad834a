"""What is trained. A Task gives the Trainer a network and per-sample losses: of diffusion here, of autoencoders and
classifiers in files of their own."""

from typing import Protocol

import torch
from torch import Tensor, nn

from ldit.config.kinds import AnySpec
from ldit.config.run import RunConfig
from ldit.config.sections import ObjectiveConfig
from ldit.config.spec import ModelSpec
from ldit.data.batch import Batch
from ldit.diffusion.build import Process, build_process
from ldit.diffusion.ddpm import DDPM
from ldit.diffusion.times import logit_normal, shifted, uniform_index
from ldit.nn.build import build_model
from ldit.nn.dit import DiT, init_parameter
from ldit.rng import generator, normal, uniform
from ldit.train.tasks.inputs import Inputs, PlainInputs, to_device

HELDOUT_BUCKETS = 4


class Task(Protocol):
    """The Trainer's view of what it trains."""

    @property
    def spec(self) -> AnySpec:
        """The content of a committed step's config.json, but for its training record."""
        ...

    def network(self) -> nn.Module:
        """The network, on the meta device."""
        ...

    def initial(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The whole parameter `name` of a fresh network, fp32 on the CPU."""
        ...

    def losses(self, model: nn.Module, batch: Batch, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Per-sample values (B,) on `device`: "loss" is what is minimised, "time" in [0, 1], where there is one, how
        noisy the sample was. The network is given inputs in `dtype`."""
        ...

    def evaluate(self, model: nn.Module, batch: Batch, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Per-sample values of held-out images, by name; a name may cover only some of the samples."""
        ...


class DiffusionTask:
    """Class-conditional diffusion. Noise, time and label dropout of a sample depend on (seed, its position) alone.
    `inputs` makes latents of what the loader reads."""

    def __init__(self, config: RunConfig, spec: ModelSpec, inputs: Inputs | None = None) -> None:
        self.spec, self.inputs = spec, inputs or PlainInputs()
        self.seed = config.train.seed
        self.objective: ObjectiveConfig = config.objective
        self.process: Process = build_process(spec.process)

    def network(self) -> DiT:
        model = build_model(self.spec.model, "meta")
        assert isinstance(model, DiT)
        return model

    def initial(self, name: str, shape: tuple[int, ...]) -> Tensor:
        value = torch.empty(shape)
        init_parameter(name, value, lambda name: generator(self.seed, "init", 0, name))
        return value

    def losses(self, model: nn.Module, batch: Batch, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        t = self._times(batch)
        losses = self._run(model, batch, self._drop(batch), t, "noise", device, dtype)
        share = (t + 1) / self.process.steps if isinstance(self.process, DDPM) else t
        return {**losses, "time": to_device(share, device)}

    def evaluate(self, model: nn.Module, batch: Batch, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Squared error of eps at evenly spread times with fixed noise: overall and by quarter of the time range."""
        share = torch.tensor([(position + 0.5) * 0.618033988749895 % 1.0 for position in batch.positions])
        t = uniform_index(share, self.process.steps) if isinstance(self.process, DDPM) else share
        losses = self._run(model, batch, batch.labels, t, "heldout", device, dtype)
        error = self.process.heldout_error(losses, to_device(t, device)).cpu()
        quarter = (share * HELDOUT_BUCKETS).long()
        buckets = {f"eps_mse_q{q + 1}": error[quarter == q] for q in range(HELDOUT_BUCKETS)}
        return {"eps_mse": error, **buckets}

    def _run(
        self,
        model: nn.Module,
        batch: Batch,
        labels: Tensor,
        t: Tensor,
        stream: str,
        device: torch.device,
        dtype: torch.dtype,
    ) -> dict[str, Tensor]:
        x0 = self.inputs(batch, device)
        shape = tuple(x0.shape[1:])
        noise = torch.stack([normal(shape, self.seed, stream, 0, position) for position in batch.positions])
        labels = to_device(labels, device)

        def predict(x_t: Tensor, time: Tensor) -> Tensor:
            return model(x_t.to(dtype), time, labels)

        return self.process.losses(predict, x0, to_device(t, device), to_device(noise, device))

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
