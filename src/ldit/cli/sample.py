"""`ldit sample --ckpt SOURCE …`, and `… --num N --out DIR | FILE.npz` for many images."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ldit.cli.arguments import parse
from ldit.cli.sampler import SamplerArguments
from ldit.errors import RequestError

if TYPE_CHECKING:
    from ldit.commands.sample import ImageJob


@dataclass(frozen=True, kw_only=True)
class SampleArguments(SamplerArguments):
    """Sample images. Defaults of the sampler come from the checkpoint. --num with --out makes a set: the same command
    goes on where it was stopped, and torchrun or srun share the work among processes."""

    ckpt: str
    """Folder, run, DiT or SiT .pt file, diffusers DiTPipeline folder, bundled name (emoji64-class-xs) or Hub id."""
    per_class: int = 1
    """Images of each label."""
    num: int | None = None
    """Images of a set, with --out; without it those of a model without classes, default 1."""
    init_image: tuple[Path, ...] = ()
    """Images to start from, one for all or one a label; cut to the size sampled."""
    strength: float | None = None
    """Noise time that they are brought to, above 0 to 1: more changes more. Default 0.6."""
    image_save_path: Path = Path("sample.png")
    """The labelled grid."""
    out: Path | None = None
    """Folder for single PNGs too; with --num the place of a set: a folder (no grid is made), or FILE.npz with arr_0 =
    images (N, H, W, 3) and arr_1 = labels."""
    latents_out: Path | None = None
    """Write latents instead of images: .safetensors, .npy or .pt. Needs no codec."""
    prompts: tuple[str, ...] = ()
    """Texts, for text-to-image models (not built yet)."""


def run(arguments: list[str]) -> int:
    args = parse(SampleArguments, arguments, "ldit sample")
    from ldit.commands.sample import make_images

    job = args.job(
        args.ckpt,
        args.per_class,
        num=args.num,
        init_image=args.init_image or None,
        strength=args.strength,
        prompts=args.prompts or None,
    )
    if args.num is not None and args.out is not None:
        return _set(args, job, args.num, args.out)
    if args.labels is not None:
        raise RequestError(f"labels {args.labels}: is for sets, which --num with --out makes")
    for line in make_images(job, args.image_save_path, args.out, args.latents_out):
        print(line)
    return 0


def _set(args: SampleArguments, job: "ImageJob", num: int, out: Path) -> int:
    from ldit.log import setup
    from ldit.pipeline.sets.job import SetJob
    from ldit.pipeline.sets.make import make_set
    from ldit.storage.signals import Stopped

    if args.latents_out is not None:
        raise RequestError("latents_out: a set holds images; leave out --latents-out, or --num")
    setup()
    try:
        whole = make_set(SetJob(job, num, args.labels), out)
    except Stopped as stop:
        print(f"ldit: {stop}: what stands of {out} is kept, the same command goes on", file=sys.stderr)
        return stop.code
    if whole:
        print(out)
    return 0
