"""The original's sample.py: its flags, its defaults, its image grid."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ldit.cli.arguments import parse
from ldit.errors import RequestError


@dataclass(frozen=True)
class OriginalSampleArguments:
    """Sample from a Large-DiT folder with the original's defaults: 250 ancestral steps, guidance 4.0, seed 0."""

    ckpt: str
    """Folder with model_args.pth (or any source that `ldit sample` takes)."""
    precision: Literal["fp32", "tf32", "fp16", "bf16"] = "tf32"
    local_diffusers_model_root: Path | None = None
    """Folder that holds stabilityai/sd-vae-ft-ema."""
    cfg_scale: float = 4.0
    num_sampling_steps: str = "250"
    seed: int = 0
    class_labels: tuple[str, ...] = ()
    caption: tuple[str, ...] = ()
    """Prompts, for a text model: an image each."""
    negative_caption: str | None = None
    """Text from which guidance leads away. Default: the empty one."""
    resolution: str | None = None
    """Width x height in pixels, such as 512x256. Default: the largest square."""
    num_gpus: int = 1
    ema: bool = True
    """Use the EMA weights; with --no_ema the raw ones."""
    image_save_path: Path | None = None
    """Default: sample_ema.png (sample.png with --no_ema) in the checkpoint's folder."""
    latents_out: Path | None = None
    """Write latents to this file (.safetensors, .npy or .pt) instead of images. No autoencoder is needed."""


def run(arguments: list[str]) -> int:
    """The original's sample.py as a request of `ldit sample`; returns the exit code."""
    args = parse(OriginalSampleArguments, arguments, "sample.py")
    if args.num_gpus != 1:
        raise RequestError(f"num_gpus: sampling uses one device, got {args.num_gpus}")
    import torch

    from ldit.commands.sample import make_images
    from ldit.config.requests.sampling import SampleRequest

    if args.precision == "tf32":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    width, height = _size(args.resolution)
    # The image goes into the checkpoint's folder, unless that is sealed: one file more would count as damage.
    folder = Path(args.ckpt)
    if not folder.is_dir() or (folder / "manifest.json").exists():
        folder = Path()
    # All settings are given, so that the checkpoint's own sampling defaults have no effect.
    request = SampleRequest(
        source=args.ckpt,
        class_labels=args.class_labels,
        prompts=args.caption or None,
        negative_prompts=None if args.negative_caption is None else (args.negative_caption,),
        width=width,
        height=height,
        solver="ddpm",
        steps=args.num_sampling_steps,
        guidance=args.cfg_scale,
        guidance_interval=(0.0, 1.0),
        guidance_schedule="constant",
        grid="uniform",
        eta=0.0,
        rope_scaling="none",
        proportional_attention=False,
        diffusion="sigma",
        last_step="tweedie",
        tolerance=1e-3,
        seed=args.seed,
        ema=args.ema,
        dtype="fp32" if args.precision == "tf32" else args.precision,
        local_diffusers_model_root=args.local_diffusers_model_root,
        image_save_path=args.image_save_path or folder / ("sample_ema.png" if args.ema else "sample.png"),
        latents_out=args.latents_out,
    )
    for line in make_images(request, published=True):
        print(line)
    return 0


def _size(resolution: str | None) -> tuple[int | None, int | None]:
    """(width, height) of "WxH"; None where it is not given."""
    if resolution is None:
        return None, None
    width, mark, height = resolution.lower().partition("x")
    if not (mark and width.isdecimal() and height.isdecimal()):
        raise RequestError(f"resolution: expected WIDTHxHEIGHT in pixels, got {resolution!r:.80}")
    return int(width), int(height)
