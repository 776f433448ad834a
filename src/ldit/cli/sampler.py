"""Flags that say how a checkpoint is sampled, for every command that makes images."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from ldit.errors import RequestError

if TYPE_CHECKING:
    from ldit.commands.sample import ImageJob


def _also(*names: str) -> object:
    return tyro.conf.arg(aliases=names)


@dataclass(frozen=True, kw_only=True)
class SamplerArguments:
    """Defaults of the sampler come from the checkpoint."""

    class_labels: tuple[str, ...] = ()
    """Class numbers or names; default every class, or the original's eight on ImageNet. A set's are dealt from these,
    by default from every class."""
    labels: Literal["balanced", "random"] | None = None
    """How a set's labels are dealt: balanced (image k has class k mod their number, the default) or random."""
    steps: Annotated[str | None, _also("--num-sampling-steps")] = None
    """Solver steps; DDPM models also take "10,15,20" and "ddim50"."""
    solver: str | None = None
    """ddpm, ddim, euler, heun, ab2, ab3, ab4, dpm++2m (dpm++), dpm++2m-sde, unipc2 or euler-maruyama."""
    grid: str | None = None
    """Where the steps lie: uniform, shifted:K, karras, cosine, or falling noise times such as 1,0.6,0.2."""
    eta: float | None = None
    """Share of noise in ddim, 0 to 1."""
    guidance: Annotated[float | None, _also("--cfg-scale")] = None
    """Classifier-free guidance scale, 1 = off."""
    guidance_channels: str | None = None
    """How many channels are guided: a number or all."""
    guidance_interval: tuple[float, float] | None = None
    """Noise times between which guidance acts."""
    guidance_schedule: str | None = None
    """How the scale follows the noise time around its mean: constant, linear or cosine (larger towards data)."""
    guide: str | None = None
    """A weaker model of the same kind that guides in the null class's place (autoguidance)."""
    seed: int = 0
    """Image k uses seed + k."""
    height: int | None = None
    """Pixels; default the training size."""
    width: int | None = None
    """Pixels; default the training size."""
    rope_scaling: str | None = None
    """Positions of images larger than those of training: none, linear, ntk or time-aware."""
    proportional_attention: bool | None = None
    """Keep the entropy of attention over another number of tokens."""
    batch_size: int = 16
    """Images sampled together; changes rounding at most."""
    ema: bool = True
    """Take the EMA weights where they are kept apart."""
    device: str | None = None
    """cpu, cuda, …; default cuda where there is one."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Weights' dtype; default fp32 on the CPU, bf16 on CUDA. The sampler's state is fp32 always."""
    offload: bool = False
    """Leave the network's blocks on the host and lend them to the device, for models larger than it."""
    int8: bool = False
    """Compute the blocks' products in 8 bits (CPU, fp32 weights): faster for wide networks, 1-2 % off."""
    compile: bool = False
    """Compile the blocks: seconds or minutes first, worth it for many images."""
    graphs: bool = False
    """An evaluation as one CUDA graph (GPU)."""
    host_modulation: bool = False
    """Keep the adaLN weights on the host."""
    local_diffusers_model_root: Path | None = None
    """Folder that holds autoencoders by name (stabilityai/sd-vae-ft-ema)."""
    heads: int | None = None
    """Attention heads of a DiT .pt of an unlisted size."""
    process: Literal["ddpm", "flow"] | None = None
    """What a .pt was trained as: ddpm = DiT, flow = SiT; default what its settings or its name say, else ddpm."""

    def job(self, source: str, per_class: int = 1, **options: Any) -> "ImageJob":
        """The request for images of `source`; `options` are more arguments of `check_request`."""
        from ldit.commands.sample import ImageJob

        channels = self.guidance_channels
        if channels is not None and channels != "all" and not channels.isdecimal():
            raise RequestError(f"guidance_channels: expected a number or all, got {channels!r}")
        options |= {
            "steps": self.steps,
            "solver": self.solver,
            "grid": self.grid,
            "eta": self.eta,
            "guidance": self.guidance,
            "guidance_channels": int(channels) if channels and channels != "all" else channels,
            "guidance_interval": self.guidance_interval,
            "guidance_schedule": self.guidance_schedule,
            "seed": self.seed,
            "height": self.height,
            "width": self.width,
            "rope_scaling": self.rope_scaling,
            "proportional_attention": self.proportional_attention,
        }
        return ImageJob(
            source=source,
            labels=self.class_labels,
            per_class=per_class,
            options={key: value for key, value in options.items() if value is not None},
            batch_size=self.batch_size,
            ema=self.ema,
            device=self.device,
            dtype=self.dtype,
            codec_root=self.local_diffusers_model_root,
            heads=self.heads,
            process=self.process,
            guide=self.guide,
            offload=self.offload,
            int8=self.int8,
            compiled=self.compile,
            graphs=self.graphs,
            host_modulation=self.host_modulation,
        )
