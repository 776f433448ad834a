"""The requests for images: what `Pipeline.sample`, `ldit sample` and `ldit evaluate` are asked for.

A class is a heading of `ldit sample --help`. Fields that are None take the default of the checkpoint or machine.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from ldit.config.requests.fields import flag

Rule = Literal["balanced", "random"]
"""How the labels of a set are assigned."""


@dataclass(frozen=True, kw_only=True)
class Images:
    """What: labels and seed."""

    class_labels: Any = field(default=(), metadata=flag(command_line=tuple[str, ...]))
    """Class numbers or names. Default: every class; in a grid of ImageNet the original's eight, of other large sets
    the first sixteen."""
    seed: int = 0
    """Image k uses seed + k."""


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Sampler (defaults come from the checkpoint): solver and steps."""

    steps: int | str | None = field(default=None, metadata=flag("num_sampling_steps", "num_inference_steps"))
    """Solver steps. DDPM models also take "10,15,20" and "ddim50"."""
    solver: str | None = None
    """ddpm, ddim, euler, heun, ab2, ab3, ab4, dpm++2m (dpm++), dpm++2m-sde, unipc2 or euler-maruyama."""
    grid: Any = field(default=None, metadata=flag(command_line=str | None))
    """Noise times of the steps: uniform, shifted:K, karras, cosine, or falling noise times such as 1,0.6,0.2."""
    eta: float | None = None
    """Share of noise in ddim, 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Guidance (defaults come from the checkpoint): scale, where it acts, and what guides."""

    guidance: float | None = field(default=None, metadata=flag("cfg_scale", "guidance_scale"))
    """Classifier-free guidance scale, 1 = off."""
    guidance_channels: int | str | None = None
    """How many channels are guided: a number or all."""
    guidance_interval: tuple[float, float] | None = None
    """Noise times between which guidance acts."""
    guidance_schedule: str | None = None
    """How the scale follows the noise time around its mean: constant, linear or cosine (larger towards data)."""
    guide: Any = field(default=None, metadata=flag(command_line=str | None))
    """A weaker model of the same kind whose output takes the place of the null class's (autoguidance)."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """Size: of the images, and what makes sizes beyond training work."""

    height: int | None = None
    """Pixels. Default: the training size."""
    width: int | None = None
    """Pixels. Default: the training size."""
    rope_scaling: str | None = None
    """Positions of images larger than those of training: none, linear, ntk or time-aware."""
    proportional_attention: bool | None = None
    """Keep the entropy of attention when the number of tokens is not that of training."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Checkpoint: which weights, and what a file does not tell of itself."""

    ema: bool = True
    """Take the EMA weights where they are kept apart."""
    heads: int | None = None
    """Attention heads of a DiT .pt of an unlisted size."""
    process: Literal["ddpm", "flow"] | None = None
    """What a .pt was trained as: ddpm = DiT, flow = SiT. Default: what its settings or its name say, else ddpm."""
    experiment: Any = field(default=None, metadata=flag(command_line=str | None))
    """FILE.py:FUNCTION that a run was trained with, where its network or process is your own. The file is run."""
    local_diffusers_model_root: Path | None = field(default=None, metadata=flag("codec_root"))
    """Folder that holds autoencoders by name (stabilityai/sd-vae-ft-ema)."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Machine: where and how it is computed."""

    batch_size: int = 16
    """Images sampled together. It changes rounding at most."""
    device: str | None = None
    """cpu, cuda, cuda:1, … Default: cuda where there is one."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Dtype of the weights. Default: fp32 on the CPU, bf16 on CUDA. The sampler's state is always fp32."""
    offload: bool = False
    """Keep the network's blocks on the host and stream them to the device, for models larger than it."""
    int8: bool = False
    """Compute the blocks' products in 8 bits (CPU, fp32 weights): faster for wide networks, 1-2 % off."""
    compile: bool = False
    """Compile the blocks: takes seconds or minutes first, worth it for many images."""
    graphs: bool = False
    """Run an evaluation as one CUDA graph (GPU)."""
    host_modulation: bool = False
    """Keep the adaLN weights on the host."""


@dataclass(frozen=True, kw_only=True)
class SamplingRequest(Images, Sampler, Guidance, Size):
    """What: the images of one call of a pipeline, checked by `ldit.pipeline.request.check_request`."""

    seeds: Any = field(default=None, metadata=flag(command_line=tuple[int, ...] | None))
    """One seed an image, instead of --seed."""
    num: int | None = field(default=None, metadata=flag(group="Set"))
    """Images of a set, with --out. Without it those of a model without classes, default 1."""
    init_image: Any = field(default=None, metadata=flag(command_line=tuple[Path, ...] | None))
    """Images to start from: one for all, or one for each label. They are cropped to the sampled size."""
    strength: float | None = None
    """How much noise the start images get first: a noise time above 0, at most 1. More changes more. Default: 0.6."""
    prompts: Any = field(default=None, metadata=flag(command_line=tuple[str, ...] | None))
    """Texts, for text-to-image models (not built yet)."""


@dataclass(frozen=True, kw_only=True)
class ModelRequest(Images, Sampler, Guidance, Size, Checkpoint, Machine):
    """Set: many images of a model that is opened from a source."""

    source: str = field(metadata=flag("ckpt", positional=True, group="What"))
    """Folder, run, DiT or SiT .pt file, diffusers DiTPipeline folder, bundled name (emoji64-class-xs) or Hub id."""
    labels: Rule | None = None
    """How a set's labels are assigned: balanced (image k has class k mod their number, the default) or random."""

    def sampling(self, **changes: Any) -> SamplingRequest:
        """What is asked of the sampler alone, whatever the machine."""
        shared = {one.name for one in fields(SamplingRequest)} & {one.name for one in fields(self)}
        return SamplingRequest(**{**{name: getattr(self, name) for name in shared}, **changes})


@dataclass(frozen=True, kw_only=True)
class SampleRequest(SamplingRequest, ModelRequest):
    """Files: what `ldit sample` is asked for."""

    per_class: int = field(default=1, metadata=flag(group="What"))
    """Images of each label."""
    image_save_path: Path = Path("sample.png")
    """The labelled grid."""
    out: Path | None = None
    """Folder for single PNGs too. With --num the place of a set: a folder (no grid is made), or FILE.npz with arr_0 =
    images (N, H, W, 3) and arr_1 = labels."""
    latents_out: Path | None = None
    """Write latents instead of images: .safetensors, .npy or .pt. Needs no codec."""
