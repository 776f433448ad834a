"""`ldit sample --ckpt SOURCE …`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ldit.cli.arguments import parse
from ldit.errors import RequestError


def _also(*names: str) -> object:
    return tyro.conf.arg(aliases=names)


@dataclass(frozen=True)
class SampleArguments:
    """Sample pictures. Defaults of the sampler come from the checkpoint."""

    ckpt: str
    """Folder, run, DiT or SiT .pt file, diffusers DiTPipeline folder, bundled name (emoji64-class-xs) or Hub id."""
    class_labels: tuple[str, ...] = ()
    """Class numbers or names; default every class, or the original's eight on ImageNet."""
    per_class: int = 1
    """Pictures of each label."""
    num: int | None = None
    """Pictures of a model without classes, default 1."""
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
    init_image: tuple[Path, ...] = ()
    """Pictures to start from, one for all or one a label; cut to the size sampled."""
    strength: float | None = None
    """Noise time that they are brought to, above 0 to 1: more changes more. Default 0.6."""
    seed: int = 0
    """Picture k uses seed + k."""
    height: int | None = None
    """Pixels; default the training size."""
    width: int | None = None
    """Pixels; default the training size."""
    rope_scaling: str | None = None
    """Positions of pictures larger than those of training: none, linear, ntk or time-aware."""
    proportional_attention: bool | None = None
    """Keep the entropy of attention over another number of tokens."""
    batch_size: int = 16
    """Pictures sampled together; does not change them."""
    image_save_path: Path = Path("sample.png")
    """The labelled grid."""
    out: Path | None = None
    """Folder for single PNGs too."""
    latents_out: Path | None = None
    """Write latents instead of pictures: .safetensors, .npy or .pt. Needs no codec."""
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
    """Compile the blocks: seconds or minutes first, worth it for many pictures."""
    local_diffusers_model_root: Path | None = None
    """Folder that holds autoencoders by name (stabilityai/sd-vae-ft-ema)."""
    heads: int | None = None
    """Attention heads of a DiT .pt of an unlisted size."""
    process: Literal["ddpm", "flow"] | None = None
    """What a .pt was trained as: ddpm = DiT, flow = SiT; default what its settings or its name say, else ddpm."""
    prompts: tuple[str, ...] = ()
    """Texts, for text-to-image models (not built yet)."""


def run(arguments: list[str]) -> int:
    args = parse(SampleArguments, arguments, "ldit sample")
    from ldit.flows.pictures import PictureJob, make_pictures

    channels = args.guidance_channels
    if channels is not None and channels != "all" and not channels.isdecimal():
        raise RequestError(f"guidance_channels: expected a number or all, got {channels!r}")
    options = {
        "num": args.num,
        "steps": args.steps,
        "solver": args.solver,
        "grid": args.grid,
        "eta": args.eta,
        "guidance": args.guidance,
        "guidance_channels": int(channels) if channels and channels != "all" else channels,
        "guidance_interval": args.guidance_interval,
        "guidance_schedule": args.guidance_schedule,
        "init_image": args.init_image or None,
        "strength": args.strength,
        "seed": args.seed,
        "height": args.height,
        "width": args.width,
        "rope_scaling": args.rope_scaling,
        "proportional_attention": args.proportional_attention,
        "prompts": args.prompts or None,
    }
    job = PictureJob(
        source=args.ckpt,
        labels=args.class_labels,
        per_class=args.per_class,
        options={key: value for key, value in options.items() if value is not None},
        batch_size=args.batch_size,
        ema=args.ema,
        device=args.device,
        dtype=args.dtype,
        codec_root=args.local_diffusers_model_root,
        heads=args.heads,
        process=args.process,
        guide=args.guide,
        offload=args.offload,
        int8=args.int8,
        compiled=args.compile,
    )
    for line in make_pictures(job, args.image_save_path, args.out, args.latents_out):
        print(line)
    return 0
