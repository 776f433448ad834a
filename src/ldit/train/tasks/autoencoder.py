"""Autoencoders as a Task: images in, images out, through a Gaussian in between (Kingma & Welling 2014)."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from ldit.codecs.pixels import labelled_grid, to_pil, to_uint8
from ldit.config.autoencoder import AutoencoderRun, AutoencoderSpec, LatentStatistics
from ldit.config.kinds import AnySpec
from ldit.data.batch import Batch
from ldit.data.loader import load_batch
from ldit.data.samples import Samples
from ldit.errors import DataError
from ldit.log import logger
from ldit.precision import COMPUTE
from ldit.rng import generator, normal
from ldit.train.hooks import heldout_hook, report_unreadable, save_grid
from ldit.train.state import TrainState
from ldit.train.step import fill_fresh
from ldit.train.tasks.inputs import to_device
from ldit.train.tasks.task import Hook, HookContext

PEAK = 2.0  # images lie in [-1, 1]
LEAST_ERROR = 1e-10  # so that a perfect image's ratio is 100 dB


SHOWN = 12  # images of a grid of reconstructions


class AutoencoderTask:
    """L1 + weighted KL. The noise of a sample depends on (seed, its position) alone."""

    flops_per_image = 0.0

    def __init__(self, config: AutoencoderRun, spec: AutoencoderSpec) -> None:
        self.config, self.spec = config, spec
        self.seed, self.kl_weight = config.train.seed, config.objective.kl_weight

    def describe(self) -> str:
        model, side = self.config.model, self.config.data.image_size // self.config.model.factor
        parameters = sum(p.numel() for p in self.network().parameters())
        return f"{parameters:,} parameters, latents {model.latent_channels} x {side} x {side}"

    def record(self) -> dict[str, str]:
        """Data and configuration say everything."""
        return {}

    def network(self) -> nn.Module:
        from ldit.codecs.kl_network import build_network

        with torch.device("meta"):
            return build_network(self.spec.model.to_diffusers())

    def initial(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Norms 1 and 0, biases 0, weights uniform within 1/sqrt(inputs of an output), as torch draws convolutions."""
        if len(shape) == 1:
            return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
        bound = torch.Size(shape[1:]).numel() ** -0.5
        return torch.empty(shape).uniform_(-bound, bound, generator=generator(self.seed, "init", 0, name))

    def begin(self, state: TrainState) -> None:
        """Fresh weights."""
        fill_fresh(state, self)

    def resumed(self, spec: AnySpec) -> None:
        """The statistics of the latents, which commits carry until they are measured again."""
        assert isinstance(spec, AutoencoderSpec)
        self.spec = replace(self.spec, latents=spec.latents)

    def losses(self, model: nn.Module, batch: Batch, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Per sample (B,): "loss" = "l1" (mean over the image's values) + kl_weight · "kl" (nats over it)."""
        images = to_device(batch.inputs, device)
        found = model(images.to(dtype), self.noise(batch, device).to(dtype))
        l1 = (found.images.float() - images).abs().mean(dim=(1, 2, 3))
        mean, logvar = found.mean.float(), found.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum(dim=(1, 2, 3)) / images[0].numel()
        return {"loss": l1 + self.kl_weight * kl, "l1": l1, "kl": kl}

    def evaluate(self, model: nn.Module, batch: Batch, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Of the reconstruction from the posterior's mean: "psnr" in dB, "l1"; and first and second moments of a drawn
        latent's values, from which `conclude` takes the statistics of all."""
        images = to_device(batch.inputs, device)
        noise = self.noise(batch, device)
        found = model(images.to(dtype), torch.zeros_like(noise).to(dtype))
        error = found.images.float().clamp(-1, 1) - images
        mean, logvar = found.mean.float(), found.logvar.float()
        values = mean + torch.exp(0.5 * logvar) * noise
        ratio = 10 * torch.log10(PEAK**2 / error.square().mean(dim=(1, 2, 3)).clamp(min=LEAST_ERROR))
        return {
            "psnr": ratio.cpu(),
            "l1": error.abs().mean(dim=(1, 2, 3)).cpu(),
            "latent_mean": values.mean(dim=(1, 2, 3)).cpu(),
            "latent_square": values.square().mean(dim=(1, 2, 3)).cpu(),
        }

    def conclude(self, values: dict[str, float]) -> None:
        """Keep the latents' statistics of held-out means, so that the next commit carries them."""
        mean = values["latent_mean"]
        deviation = max(values["latent_square"] - mean * mean, 0.0) ** 0.5
        self.spec = replace(self.spec, latents=LatentStatistics(round(mean, 6), round(deviation, 6)))

    def noise(self, batch: Batch, device: torch.device) -> Tensor:
        """Standard normal (B, C, h, w) fp32."""
        model, side = self.spec.model, batch.inputs.shape[-1] // self.spec.model.factor
        shape = (model.latent_channels, side, side)
        noise = torch.stack([normal(shape, self.seed, "posterior", 0, position) for position in batch.positions])
        return to_device(noise, device)

    def hooks(self, context: HookContext) -> list[Hook]:
        """Quality of reconstructions and statistics of latents, of held-out images, or of training images where none
        are held out; grids of image pairs."""
        heldout, data = self.config.heldout, context.heldout
        if data is None:
            logger.info("no held-out images: psnr is measured on training images")
            data = context.data
        measure = heldout_hook(self, data, heldout.num, context)

        def run(state: TrainState) -> dict[str, float]:
            values = measure(state)
            if values:  # none where heldout.num is 0 or no image could be read
                self.conclude(values)
            return values

        pairs = reconstruction_hook(self, data, self.config.train.sample_every, context)
        return [Hook(heldout.every, run), pairs]


def open_autoencoder(config: AutoencoderRun, data: Samples) -> AutoencoderTask:
    """The task of a run on `data`; DataError for latents."""
    if data.cache is not None:
        raise DataError(f"data.path: {data.root} holds latents, an autoencoder is trained on images")
    return AutoencoderTask(config, AutoencoderSpec(config.model))


def reconstruction_hook(task: AutoencoderTask, data: Samples, every: int, context: HookContext) -> Hook:
    """Images above what the EMA weights make of them: RUN/samples/step-….png. With data.bad "skip" those that cannot
    be read are not shown, and made known."""
    count = min(SHOWN, len(data))
    indices = [i * len(data) // count for i in range(count)]

    def run(state: TrainState) -> None:
        dtype, device = COMPUTE[state.config.train.precision], state.world.device
        batch = load_batch(data, range(len(indices)), indices, None, state.config.data.bad)
        report_unreadable(batch.faults, data, context, state)
        # Every process takes part in the pass; one that can show nothing does it on zeros.
        batch = batch.readable() if any(batch.sound) else batch
        with state.weights.swapped_in(state.averages.main) as model, torch.no_grad():
            noise = torch.zeros_like(task.noise(batch, device))
            found = model(batch.inputs.to(device, dtype), noise.to(dtype)).images.float().cpu()
        if state.world.is_main and not batch.faults:
            both = torch.stack([batch.inputs, found], dim=1).flatten(0, 1)
            grid = labelled_grid(to_pil(to_uint8(both)), ["image", "reconstruction"] * len(batch), columns=8, scale=2)
            save_grid(context.out, state.step, grid)

    return Hook(every, run)
