"""The task of training an autoencoder with a Gaussian latent (Kingma & Welling 2014)."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from ldit.codecs.pixels import labelled_grid, to_pil, to_uint8
from ldit.config.autoencoder import AutoencoderRun, AutoencoderSpec, LatentStatistics
from ldit.config.experiment import Experiment
from ldit.config.kinds import AnySpec
from ldit.data.batch import Batch
from ldit.data.loader import load_batch
from ldit.data.samples import Samples
from ldit.errors import DataError
from ldit.log import logger
from ldit.precision import COMPUTE
from ldit.readable import count
from ldit.rng import generator, normal
from ldit.training.hooks import heldout_hook, report_unreadable, save_grid
from ldit.training.state import TrainState
from ldit.training.step import fill_fresh
from ldit.training.tasks.inputs import to_device
from ldit.training.tasks.task import Hook, HookContext

PEAK = 2.0  # the range of values in [-1, 1]
LEAST_ERROR = 1e-10  # bounds the PSNR of a perfect image
SHOWN = 12  # images in a grid of reconstructions


class AutoencoderTask:
    """L1 + weighted KL. The noise of a sample depends on (seed, its position) alone."""

    flops_per_image = 0.0

    def __init__(self, config: AutoencoderRun, spec: AutoencoderSpec) -> None:
        self.config, self.spec = config, spec
        self.seed, self.kl_weight = config.train.seed, config.objective.kl_weight

    def describe(self) -> str:
        model, side = self.config.model, self.config.data.image_size // self.config.model.factor
        parameters = sum(p.numel() for p in self.network().parameters())
        return f"{count(parameters)} parameters, latents {model.latent_channels} x {side} x {side}"

    def record(self) -> dict[str, str | None]:
        """Nothing besides data and configuration."""
        return {}

    def network(self) -> nn.Module:
        from ldit.codecs.kl_network import build_network

        with torch.device("meta"):
            return build_network(self.spec.model.to_diffusers())

    def initial(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Norm scales 1, biases 0, weights uniform within 1/sqrt(fan_in), as torch initialises convolutions."""
        if len(shape) == 1:
            return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
        bound = torch.Size(shape[1:]).numel() ** -0.5
        return torch.empty(shape).uniform_(-bound, bound, generator=generator(self.seed, "init", 0, name))

    def begin(self, state: TrainState) -> None:
        """Fresh weights."""
        fill_fresh(state, self)

    def resumed(self, spec: AnySpec) -> None:
        """Take the latents' statistics from the step; they are saved with every step until measured again."""
        assert isinstance(spec, AutoencoderSpec)
        self.spec = replace(self.spec, latents=spec.latents)

    def losses(self, model: nn.Module, batch: Batch, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Per sample (B,): "loss" = "l1" (mean over the image's values) + kl_weight · "kl" (nats per value)."""
        images = to_device(batch.inputs, device)  # (B, 3, H, W)
        output = model(images.to(dtype), self.noise(batch, device).to(dtype))
        l1 = (output.images.float() - images).abs().mean(dim=(1, 2, 3))
        mean, logvar = output.mean.float(), output.logvar.float()  # (B, C, h, w)
        kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum(dim=(1, 2, 3)) / images[0].numel()
        return {"loss": l1 + self.kl_weight * kl, "l1": l1, "kl": kl}

    def evaluate(self, model: nn.Module, batch: Batch, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Per sample: "psnr" in dB and "l1" of the reconstruction from the posterior's mean; first and second moment of
        a drawn latent's values, from which `conclude` computes the latents' statistics."""
        images = to_device(batch.inputs, device)
        noise = self.noise(batch, device)
        output = model(images.to(dtype), torch.zeros_like(noise).to(dtype))
        error = output.images.float().clamp(-1, 1) - images
        mean, logvar = output.mean.float(), output.logvar.float()
        values = mean + torch.exp(0.5 * logvar) * noise
        ratio = 10 * torch.log10(PEAK**2 / error.square().mean(dim=(1, 2, 3)).clamp(min=LEAST_ERROR))
        return {
            "psnr": ratio.cpu(),
            "l1": error.abs().mean(dim=(1, 2, 3)).cpu(),
            "latent_mean": values.mean(dim=(1, 2, 3)).cpu(),
            "latent_square": values.square().mean(dim=(1, 2, 3)).cpu(),
        }

    def conclude(self, values: dict[str, float]) -> None:
        """Set the latents' mean and deviation from held-out means; the next checkpoint saves them."""
        mean = values["latent_mean"]
        deviation = max(values["latent_square"] - mean * mean, 0.0) ** 0.5
        self.spec = replace(self.spec, latents=LatentStatistics(round(mean, 6), round(deviation, 6)))

    def noise(self, batch: Batch, device: torch.device) -> Tensor:
        """Standard normal noise (B, C, h, w), fp32, by (seed, position)."""
        model, side = self.spec.model, batch.inputs.shape[-1] // self.spec.model.factor
        shape = (model.latent_channels, side, side)
        noise = torch.stack([normal(shape, self.seed, "posterior", 0, position) for position in batch.positions])
        return to_device(noise, device)

    def hooks(self, context: HookContext) -> list[Hook]:
        """Held-out PSNR with the latents' statistics, and grids of image pairs; on training images if none are held
        out."""
        heldout, data = self.config.heldout, context.heldout
        if data is None:
            logger.info("no held-out images: psnr is measured on training images")
            data = context.data
        measure = heldout_hook(self, data, heldout.num, context)

        def run(state: TrainState) -> dict[str, float]:
            values = measure(state)
            if values:  # empty if heldout.num is 0 or no image could be read
                self.conclude(values)
            return values

        pairs = reconstruction_hook(self, data, self.config.train.sample_every, context)
        return [Hook(heldout.every, run), pairs]


def open_autoencoder(experiment: Experiment, data: Samples, device: torch.device) -> AutoencoderTask:
    """The task of a run on `data`; DataError if that is a latent cache."""
    config = experiment.config
    assert isinstance(config, AutoencoderRun)
    if data.cache is not None:
        raise DataError(f"data.path: {data.root} holds latents, an autoencoder is trained on images")
    return AutoencoderTask(config, AutoencoderSpec(config.model))


def reconstruction_hook(task: AutoencoderTask, data: Samples, every: int, context: HookContext) -> Hook:
    """A hook that writes RUN/samples/step-….png: pairs of an image and its reconstruction by the EMA weights. With
    data.bad "skip", images that cannot be read are reported, and no grid is written."""
    count = min(SHOWN, len(data))
    indices = [i * len(data) // count for i in range(count)]

    def run(state: TrainState) -> None:
        dtype, device = COMPUTE[state.config.train.precision], state.world.device
        batch = load_batch(data, range(len(indices)), indices, None, state.config.data.bad)
        report_unreadable(batch.faults, data, context, state)
        # Every rank takes part in the forward pass, even if none of its images could be read.
        batch = batch.readable() if any(batch.sound) else batch
        with state.weights.swapped_in(state.averages.main) as model, torch.no_grad():
            noise = torch.zeros_like(task.noise(batch, device))
            outputs = model(batch.inputs.to(device, dtype), noise.to(dtype)).images.float().cpu()  # (B, 3, H, W)
        if state.world.is_main and not batch.faults:
            both = torch.stack([batch.inputs, outputs], dim=1).flatten(0, 1)  # image, reconstruction, image, …
            images, captions = to_pil(to_uint8(both)), ["image", "reconstruction"] * len(batch)
            save_grid(context.out, state.step, partial(labelled_grid, images, captions, columns=8, scale=2))

    return Hook(every, run, after_save=True)
