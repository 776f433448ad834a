"""Opens autoencoders trained by ldit, and writes them in the layout of diffusers, from which codecs are opened."""

from dataclasses import dataclass
from pathlib import Path

import torch

from ldit.checkpoint.export import CONFIG, has_ema, read_any_spec, read_weights, verify_export
from ldit.checkpoint.run import holds, open_step
from ldit.config.autoencoder import AUTOENCODER, AutoencoderSpec
from ldit.errors import SourceError
from ldit.storage.atomic import write_json
from ldit.storage.tensors import NamedTensors, write_safetensors

WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class AutoencoderSource:
    """A committed step of an autoencoder's run, whose weight files match the manifest."""

    path: Path
    spec: AutoencoderSpec

    def has_ema(self) -> bool:
        """Whether there are separate EMA weights."""
        return has_ema(self.path)

    def tensors(self, ema: bool = True) -> NamedTensors:
        """Named tensors, memory-mapped, one by one."""
        return read_weights(self.path, ema)


def holds_autoencoder(path: Path) -> bool:
    """Whether `path` is a run that trains an autoencoder, or a step of one."""
    return holds(path, AUTOENCODER)


def open_autoencoder(path: Path) -> AutoencoderSource:
    """The latest valid step of a run, or the given step; SourceError when it is damaged."""
    return open_step(path, _opened)


def _opened(folder: Path) -> AutoencoderSource:
    for ema in (True, False):
        verify_export(folder, ema)
    spec = read_any_spec(folder)
    if not isinstance(spec, AutoencoderSpec):
        raise SourceError(f"{folder} is not an autoencoder")
    return AutoencoderSource(folder, spec)


def write_diffusers(
    folder: Path, spec: AutoencoderSpec, tensors: NamedTensors, dtype: torch.dtype | None = None
) -> None:
    """Write AutoencoderKL's config.json and weights into an existing folder. If the run measured its latents, scale and
    shift normalise them to mean 0 and deviation 1."""
    config = spec.model.to_diffusers()
    if spec.latents is not None:
        config |= {
            "scaling_factor": float(f"{1.0 / max(spec.latents.std, 1e-6):.6g}"),
            "shift_factor": spec.latents.mean,
        }
    write_json(folder / CONFIG, {**config, "force_upcast": False})
    write_safetensors(folder / WEIGHTS, tensors, dtype)
