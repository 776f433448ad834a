"""Autoencoders as a Task: images in, images out, through a Gaussian in between (Kingma & Welling 2014)."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from ldit.config.autoencoder import AutoencoderRun, AutoencoderSpec, LatentStatistics
from ldit.data.batch import Batch
from ldit.rng import generator, normal
from ldit.train.tasks.inputs import to_device

PEAK = 2.0  # images lie in [-1, 1]
LEAST_ERROR = 1e-10  # so that a perfect image's ratio is 100 dB


class AutoencoderTask:
    """L1 + weighted KL. The noise of a sample depends on (seed, its position) alone."""

    def __init__(self, config: AutoencoderRun, spec: AutoencoderSpec) -> None:
        self.spec = spec
        self.seed, self.kl_weight = config.train.seed, config.objective.kl_weight

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
