"""Diffusion as a Task: a network, a process, latents of the images, and their classes or captions."""

from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ldit.codecs.codec import Codec
from ldit.codecs.conditioners import Conditioner, TextConditioner, build_conditioner
from ldit.codecs.latents import enlarged
from ldit.codecs.text import portable_text_model
from ldit.config.experiment import Experiment, identity_of, is_of_package, name_of
from ldit.config.kinds import AnySpec
from ldit.config.model import TextModelConfig
from ldit.config.run import RunConfig
from ldit.config.sections import StageConfig
from ldit.config.spec import (
    AutoencoderConfig,
    ClassConditionerConfig,
    ConditionerConfig,
    ModelSpec,
    TextConditionerConfig,
)
from ldit.data.batch import Batch
from ldit.data.captions import Captions
from ldit.data.samples import Samples
from ldit.diffusion.build import build_process
from ldit.diffusion.process import Prediction, Process, samples_alike
from ldit.errors import ConfigError
from ldit.log import logger
from ldit.nn.build import build_model, forward_flops
from ldit.nn.conditioning import TextCondition, TrainingInputs
from ldit.nn.dit import init_parameter
from ldit.readable import count
from ldit.rng import generator, uniform
from ldit.training.hooks import attention_hook, heldout_hook
from ldit.training.state import TrainState
from ldit.training.step import fill_fresh
from ldit.training.tasks.conditions import open_text_conditioner
from ldit.training.tasks.inputs import EncodedInputs, Inputs, PlainInputs, open_inputs, to_device, training_noise
from ldit.training.tasks.own_objects import (
    NetworkBuilder,
    check_losses,
    check_network,
    check_output,
    check_process,
)
from ldit.training.tasks.task import Hook, HookContext

HELDOUT_BUCKETS = 4
_GOLDEN = 0.618033988749895  # multiples of it, modulo 1, spread evenly however many are taken


class DiffusionTask:
    """Diffusion. Noise, time, label dropout and choice of a caption of a sample depend on (seed, its position) alone.

    `inputs` makes latents of what the loader reads. `process` and `network` take the place of those that the
    configuration describes (`ldit.Experiment`). `codec` is what images are decoded with, None where it is not found.
    `conditioner` and `captions` are those of a text model, whose labels are rows of `captions`.
    """

    def __init__(
        self,
        config: RunConfig,
        spec: ModelSpec,
        inputs: Inputs | None = None,
        process: Process | None = None,
        network: NetworkBuilder | None = None,
        codec: Codec | None = None,
        conditioner: Conditioner | None = None,
        captions: Captions | None = None,
    ) -> None:
        self.config, self.spec, self.inputs, self.codec = config, spec, inputs or PlainInputs(), codec
        self.seed = config.train.seed
        self.process = process or build_process(spec.process, config.objective)
        self.conditioner, self.captions = conditioner or build_conditioner(spec), captions
        self._network = network
        side = config.model.input_size
        # Stages and routing have another number of FLOPs, and a network of the user's an unknown one: no MFU is logged.
        unknown = network is not None or bool(config.stages) or config.objective.route > 0
        self.flops_per_image = 0.0 if unknown else 3.0 * forward_flops(config.model, side, side)

    def describe(self) -> str:
        return f"{count(sum(p.numel() for p in self.network().parameters()))} parameters"

    def record(self) -> dict[str, str | None]:
        """Names of the user's objects, and the fingerprint of the autoencoder that images go through; that of cached
        latents is in their manifest."""
        own = not is_of_package(type(self.process))
        record = {
            "objective": identity_of(self.process) if own else None,
            "network": None if self._network is None else name_of(self._network),
        }
        if isinstance(self.inputs, EncodedInputs):
            record["codec"] = self.inputs.codec.fingerprint()
        if isinstance(self.conditioner, TextConditioner) and self.conditioner.encoder:
            record["text"] = self.conditioner.encoder
        return record

    def network(self) -> nn.Module:
        if self._network is None:
            return build_model(self.spec.model, "meta")
        with torch.device("meta"):
            return self._network(self.config.model)

    def initial(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name == "pos_embed":
            from ldit.nn.dit_original import OriginalDiT, fixed_table

            network = self.network()
            if isinstance(network, OriginalDiT):
                return fixed_table(network.config)
        value = torch.empty(shape)
        init_parameter(name, value, lambda name: generator(self.seed, "init", 0, name))
        return value

    def begin(self, state: TrainState) -> None:
        """Fresh weights; with train.init_from those of another checkpoint where they fit. Averages begin as them."""
        fill_fresh(state, self)
        train = self.config.train
        if train.init_from:
            from ldit.training.init_from import start_from

            start_from(train.init_from, train.init_ema, self.spec, state)

    def resumed(self, spec: AnySpec) -> None:
        """The configuration holds everything."""

    def losses(self, model: nn.Module, batch: Batch, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        stage, process = self.stage_of(batch)
        t = self.draw_times(batch)
        x0 = self.inputs(batch, device, None if stage is None else stage.size)
        small = self._small(batch, x0, noisy=True)
        x0, given = self._training_inputs(x0, batch)
        losses = self._losses(model, batch, x0, self.draw_labels(batch), t, "noise", dtype, process, given, small)
        return {**losses, "time": to_device(process.noise_times(t), device)}

    def stage_of(self, batch: Batch) -> tuple[StageConfig | None, Process]:
        """The stage of a batch, None for the full size, and its process."""
        end = 0
        for stage in self.config.stages:
            end += stage.steps
            if batch.step < end:
                own: Any = self.process
                return stage, own if stage.shift is None else replace(own, shift=stage.shift)
        return None, self.process

    def _small(self, batch: Batch, x0: Tensor, noisy: bool) -> Tensor | None:
        """The images at a smaller size, enlarged to that of x0, for the second stage of a cascade; None for others. In
        training with noise, whose deviation is drawn as well, by (seed, position)."""
        cascade = self.config.cascade
        if not cascade.size:
            return None
        small = self.inputs(batch, x0.device, cascade.size)
        if noisy and cascade.noise:
            drawn = [generator(self.seed, "cascade", 0, position) for position in batch.positions]
            rows = [
                cascade.noise * torch.rand((), generator=g) * torch.randn(small.shape[1:], generator=g) for g in drawn
            ]
            small = small + to_device(torch.stack(rows), small.device)
        return enlarged(small, x0.shape[2:])

    def draw_times(self, batch: Batch) -> Tensor:
        """Training times (B,) on the CPU."""
        generators = [generator(self.seed, "time", 0, position) for position in batch.positions]
        return self.stage_of(batch)[1].draw_times(generators, self.config.objective)

    def _training_inputs(self, x0: Tensor, batch: Batch) -> tuple[Tensor, TrainingInputs | None]:
        """The images after augmentation, and what the network is given in training alone; None where it is nothing.
        Everything is drawn by (seed, position)."""
        objective, model = self.config.objective, self.config.model
        if not (objective.augment or objective.route or objective.dropout):
            return x0, None
        augmentation = kept = seeds = None
        if objective.augment:
            from ldit.training.tasks.augment import augmented_with_labels

            x0, augmentation = augmented_with_labels(x0, batch.positions, self.seed, objective.augment)
        if objective.route:
            count = (x0.shape[-1] // model.side_unit) ** 2
            passing = max(1, round(count * (1 - objective.route)))
            orders = [torch.randperm(count, generator=generator(self.seed, "route", 0, p)) for p in batch.positions]
            kept = to_device(torch.stack([order[:passing] for order in orders]), x0.device)
        if objective.dropout:
            drawn = [torch.randint(1 << 31, (), generator=generator(self.seed, "drop-updates", 0, p)).item()
                     for p in batch.positions]  # fmt: skip
            seeds = to_device(torch.tensor(drawn, dtype=torch.int64), x0.device)
        first, last = objective.route_blocks
        return x0, TrainingInputs(augmentation, kept, (first - 1, last), seeds, objective.dropout)

    def draw_labels(self, batch: Batch) -> Tensor:
        """Labels (B,) with the null label in place of a share of them; of a text model one text of each sample."""
        labels, captions = batch.labels, self.captions
        if captions is not None:
            shares = [uniform(self.seed, "caption", 0, position) for position in batch.positions]
            pairs = zip(labels.tolist(), shares, strict=True)
            labels = torch.tensor([captions.draw(row, share) for row, share in pairs])
        drawn = torch.tensor([uniform(self.seed, "drop", 0, position) for position in batch.positions])
        return self.conditioner.drop(labels, drawn)

    def evaluate(self, model: nn.Module, batch: Batch, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Squared error of eps at evenly spread times with fixed noise: overall and by quarter of the time range."""
        share = torch.tensor([(position + 0.5) * _GOLDEN % 1.0 for position in batch.positions])
        t = self.process.times_at(share)
        x0 = self.inputs(batch, device)
        labels = batch.labels
        if self.captions is not None:
            labels = torch.tensor([self.captions.main(row) for row in labels.tolist()])
        small = self._small(batch, x0, noisy=False)
        losses = self._losses(model, batch, x0, labels, t, "heldout", dtype, self.process, small=small)
        error = self.process.heldout_error(losses, to_device(t, device)).cpu()
        quarter = (share * HELDOUT_BUCKETS).long()
        buckets = {f"eps_mse_q{q + 1}": error[quarter == q] for q in range(HELDOUT_BUCKETS)}
        return {"eps_mse": error, **buckets}

    def _losses(
        self,
        model: nn.Module,
        batch: Batch,
        x0: Tensor,
        labels: Tensor,
        t: Tensor,
        stream: str,
        dtype: torch.dtype,
        process: Process,
        given: TrainingInputs | None = None,
        small: Tensor | None = None,
    ) -> dict[str, Tensor]:
        # Held-out losses are measured with plain noise and the last head, whatever training draws.
        in_training, device = stream == "noise", x0.device
        draws = self.config.objective.nearest_of if in_training else 1
        noise = training_noise(x0, batch.positions, self.seed, stream, draws)
        cond, t = self.conditioner.encode(labels, device), to_device(t, device)
        if isinstance(cond, TextCondition):
            cond = cond.to(dtype)
        options: dict[str, Any] = {} if given is None else {"training": given}
        has_mid = in_training and self.config.model.mid_layer > 0
        second: list[Tensor] = []

        def predict(x_t: Tensor, time: Tensor) -> Tensor | Prediction:
            x_t = x_t.to(dtype)
            seen = x_t if small is None else torch.cat([x_t, small.to(dtype)], dim=1)
            if has_mid:
                prediction, mid = model(seen, time, cond, mid=True, **options)
                second.append(mid)
            else:
                prediction = model(seen, time, cond, **options)
            check_output(prediction, x_t)
            return prediction

        losses = process.losses(predict, x0, t, noise)
        check_losses(losses, len(x0), process)
        if has_mid:
            # The same loss of the second head's output, from the same forward pass.
            mid = process.losses(lambda x_t, time: second[0], x0, t, noise)
            losses = {**losses, "loss": losses["loss"] + self.config.objective.mid_weight * mid["loss"],
                      "mid_loss": mid["loss"]}  # fmt: skip
        return losses

    def hooks(self, context: HookContext) -> list[Hook]:
        """Held-out loss, and the largest attention logits. Sample grids and evaluation are the command's business."""
        heldout = self.config.heldout
        hooks = [Hook(self.config.train.attention_every, attention_hook(self, context.data))]
        if context.heldout is None and heldout.every:
            logger.info("no held-out images: no held-out loss is measured (data.heldout names a list)")
        if context.heldout is not None and heldout.num:
            hooks.insert(0, Hook(heldout.every, heldout_hook(self, context.heldout, heldout.num, context)))
        return hooks


def open_diffusion(experiment: Experiment, data: Samples, device: torch.device) -> DiffusionTask:
    """The task of a run on `data`. ConfigError, DataError or CodecError when codec, data and model do not fit."""
    config, network, objective = experiment.config, experiment.network, experiment.objective
    assert isinstance(config, RunConfig)
    inputs, codec = open_inputs(config, data, device)
    # The steps say what the package does not have: a network, a process that samples in another way.
    training: dict[str, Any] = {}
    if objective is not None:
        check_process(objective)
        names = [field.name for field in fields(objective)] if is_dataclass(objective) else []
        if any(stage.shift is not None for stage in config.stages) and "shift" not in names:
            raise ConfigError(f"stages: shift: {name_of(type(objective))} is no dataclass with a field `shift`")
    if network is not None:
        check_network(network, config.model)
        training["network"] = name_of(network)
    if objective is not None and not samples_alike(objective, build_process(config.process)):
        training["process"] = name_of(type(objective))
    spec = model_spec(config, data, training or None)
    if not isinstance(config.model, TextModelConfig):
        return DiffusionTask(config, spec, inputs, objective, network, codec)
    captions = data.captions()
    conditioner = open_text_conditioner(config.text, spec, captions, device, config.data.verify)
    return DiffusionTask(config, spec, inputs, objective, network, codec, conditioner, captions)


def model_spec(config: RunConfig, data: Samples, training: dict[str, Any] | None = None) -> ModelSpec:
    """The spec of the run's steps. A codec's folder is named by its whole path, for steps are opened from anywhere."""
    codec, names = config.codec, data.names or None
    if isinstance(codec, AutoencoderConfig):
        from ldit.codecs.open import portable_name

        codec = replace(codec, name=portable_name(codec.name))
    conditioner: ConditionerConfig = ClassConditionerConfig(names)
    if isinstance(config.model, TextModelConfig):
        text = config.text
        tokenizer = portable_text_model(text.tokenizer) if text.tokenizer else None
        encoder = portable_text_model(text.encoder)
        conditioner = TextConditionerConfig(encoder, text.max_tokens, "", tokenizer, text.dropout > 0)
    cascade = config.cascade if config.cascade.size else None
    return ModelSpec(config.model, config.process, codec, conditioner, config.sampling, training, cascade)
