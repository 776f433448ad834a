"""The requests for images, of `Pipeline.sample`, `ldit sample` and `ldit evaluate`.

Each class is a heading of `ldit sample --help`. None stands for the default of the checkpoint or machine.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from ldit.config.requests.fields import flag

Rule = Literal["balanced", "random"]
"""How the labels of a set are assigned."""


@dataclass(frozen=True, kw_only=True)
class Images:
    """What: labels or prompts, and seed."""

    class_labels: Any = field(default=(), metadata=flag(command_line=tuple[str, ...]))
    """Classes of the images, by number or name. Default: all. The grid of `ldit sample` shows only eight of ImageNet's
    classes by default, and at most the first sixteen of other models."""
    seed: int = 0
    """Seed of the noise: image k, counted from 0, uses seed + k."""
    prompts: Any = field(default=None, metadata=flag(command_line=tuple[str, ...] | None))
    """Texts, for text models: one image each."""
    prompts_file: Path | None = None
    """File with a prompt a line, instead of --prompts."""
    negative_prompts: Any = field(default=None, metadata=flag("negative_prompt", command_line=tuple[str, ...] | None))
    """Texts from which guidance leads away, instead of no text: one for all images, or one for each prompt."""


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Sampler (defaults come from the checkpoint): solver and steps."""

    steps: int | str | None = field(default=None, metadata=flag("num_sampling_steps", "num_inference_steps"))
    """Number of solver steps. DDPM models also take lists such as "10,15,20" (steps in each part of the schedule), and
    "ddim50"."""
    solver: str | None = None
    """ddpm, ddim, euler, heun, ab2, ab3, ab4, dpm++2m (dpm++), dpm++3m, dpm++2m-sde, unipc2, unipc3, unipc2-bh1,
    unipc3-bh1, euler-maruyama or dopri5."""
    grid: Any = field(default=None, metadata=flag(command_line=str | None))
    """How the steps are spread over noise time (1 = noise, 0 = data): uniform, shifted:K, karras, logsnr, cosine, or
    a falling list such as 1,0.6,0.2."""
    eta: float | None = None
    """Noise that ddim adds at each step: 0 = none, 1 = as much as ddpm."""
    diffusion: str | None = None
    """Noise that euler-maruyama adds: SiT's diffusion coefficient constant, sigma, linear, sbdm, decreasing or
    increasing-decreasing, with a factor as in sigma:0.5."""
    last_step: str | None = None
    """euler-maruyama's step to clean data: mean, tweedie, euler or none, with its length in noise time as in
    mean:0.04."""
    tolerance: float | None = None
    """Relative error that dopri5 allows in a step (default 0.001); the absolute one is a thousandth of it."""


INTERNAL = "internal"
"""The guide that is the model's own second head."""


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Guidance (defaults come from the checkpoint): scale, where it acts, and what guides."""

    guidance: float | None = field(default=None, metadata=flag("cfg_scale", "guidance_scale"))
    """Scale of classifier-free guidance; 1 = off."""
    guidance_channels: int | str | None = None
    """Number of latent channels that are guided, or all."""
    guidance_interval: tuple[float, float] | None = None
    """Noise times between which guidance is on, such as 0.3 0.9 (0 = data, 1 = noise)."""
    guidance_schedule: str | None = None
    """How the guidance scale changes over noise time: constant, linear or cosine (larger towards data; the mean is the
    scale)."""
    guide: Any = field(default=None, metadata=flag(command_line=str | None))
    """Autoguidance: a weaker checkpoint of the same kind, whose output takes the place of the unconditional one;
    internal = the model's own second head does (model.mid_layer)."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """Size: of the images, and what makes sizes beyond training work."""

    height: int | None = None
    """Height of the images in pixels. Default: the training size."""
    width: int | None = None
    """Width of the images in pixels. Default: the training size."""
    rope_scaling: str | None = None
    """How rotary positions are scaled for images larger than in training: none, linear, ntk or time-aware."""
    proportional_attention: bool | None = None
    """Scale attention so that its entropy stays as in training when the number of tokens differs."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Checkpoint: which weights, and facts that some files do not store."""

    ema: bool = True
    """Use the EMA weights where the checkpoint has both kinds."""
    heads: int | None = None
    """Number of attention heads, for a DiT .pt whose size is not one of the published ones."""
    process: Literal["ddpm", "flow"] | None = None
    """Process that a .pt was trained with: ddpm (DiT) or flow (SiT). Default: as its settings or its name say, else
    ddpm."""
    experiment: Any = field(default=None, metadata=flag(command_line=str | None))
    """FILE.py:FUNCTION with which the run was trained, if it has a network or process of your own. The file is
    executed."""
    verify: bool = True
    """Compare the weights with their checksums; a large file is read for that only when it is new or has changed."""
    local_diffusers_model_root: Path | None = field(default=None, metadata=flag("codec_root"))
    """Folder in which autoencoders are looked for by name, such as stabilityai/sd-vae-ft-ema."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Machine: where the computation runs, and how."""

    batch_size: int = 16
    """Images sampled at once. It affects only speed, memory and rounding."""
    device: str | None = None
    """cpu, cuda, cuda:1, … Default: cuda where there is one."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Dtype of the weights. Default: fp32 on the CPU, bf16 on CUDA. The images being sampled are always in fp32."""
    offload: bool = False
    """Keep the network's blocks in host memory and stream them to the device: for models that do not fit into its
    memory."""
    int8: bool = False
    """Matrix products in 8 bits (CPU, fp32 weights): faster for wide networks; outputs differ by 1-2 %."""
    compile: bool = False
    """Compile the blocks with torch.compile: takes seconds to minutes at first, pays off for many images. The default
    on GPUs for class models and sets of 2,000 images or more."""
    graphs: bool = False
    """Run each evaluation of the network as one CUDA graph: the default for class models on a GPU."""
    host_modulation: bool = False
    """Keep the adaLN weights, a quarter of a 600M network, in host memory."""
    eager: bool = False
    """On a GPU use no CUDA graphs, and compile nothing for large sets either."""


@dataclass(frozen=True, kw_only=True)
class SamplingRequest(Images, Sampler, Guidance, Size):
    """What: the images of one call of a pipeline; `ldit.pipeline.request.check_request` checks the request."""

    seeds: Any = field(default=None, metadata=flag(command_line=tuple[int, ...] | None))
    """A seed for each image, instead of --seed."""
    num: int | None = field(default=None, metadata=flag(group="Set"))
    """With --out: make a set of this many images. Without --out: number of images of a model without classes, default
    1."""
    init_image: Any = field(default=None, metadata=flag(command_line=tuple[Path, ...] | None))
    """Image files to start from instead of noise: one for all, or one for each label. They are resized and cropped to
    the sampled size."""
    from_image: Any = field(default=None, metadata=flag(command_line=tuple[Path, ...] | None))
    """Small images to enlarge, for the second stage of a cascade: one for all, or one for each label or prompt."""
    strength: float | None = None
    """Noise added to the start images, as a noise time above 0 and at most 1. More noise changes them more. Default:
    0.6."""


@dataclass(frozen=True, kw_only=True)
class ModelRequest(Images, Sampler, Guidance, Size, Checkpoint, Machine):
    """Set: many images of a model that is opened from a source."""

    source: str = field(metadata=flag("ckpt", positional=True, group="What"))
    """Checkpoint: run directory, folder, DiT or SiT .pt file, diffusers DiTPipeline folder, bundled name
    (emoji64-class-xs) or Hub id."""
    labels: Rule | None = None
    """Labels of a set of images: balanced (the classes in turn, the default) or random."""

    def sampling(self, **changes: Any) -> SamplingRequest:
        """The fields that concern the sampler alone, with `changes`."""
        shared = {one.name for one in fields(SamplingRequest)} & {one.name for one in fields(self)}
        return SamplingRequest(**{**{name: getattr(self, name) for name in shared}, **changes})


@dataclass(frozen=True, kw_only=True)
class SampleRequest(SamplingRequest, ModelRequest):
    """Files: the images of `ldit sample`, and the files they are written to."""

    per_class: int = field(default=1, metadata=flag(group="What"))
    """Number of images of each label."""
    image_save_path: Path = Path("sample.png")
    """File for the labelled grid of all images."""
    out: Path | None = None
    """Folder for single PNGs, in addition to the grid. With --num: folder of the set (no grid is made), or FILE.npz
    with arr_0 = images (N, H, W, 3) and arr_1 = labels."""
    base: str | None = field(default=None, metadata=flag(group="What"))
    """First stage of a cascade: a model that makes the small images from the same labels or prompts and seeds, which
    this one enlarges."""
    latents_out: Path | None = None
    """Write latents to this file (.safetensors, .npy or .pt) instead of images. No autoencoder is needed."""
