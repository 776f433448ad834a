"""`ldit encode PATH --out CACHE`."""

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ldit.cli.arguments import parse


@dataclass(frozen=True)
class EncodeArguments:
    """Images through an autoencoder into a latent cache, which trains as the images would. The same command goes on
    where it was stopped; torchrun or srun share the work among processes."""

    path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
    """Images: a folder of class folders, loose images, metadata.jsonl, IDX files or tar shards, or the bundled
    "emoji64". A set is known by its names (and sizes in tars): images changed under their names are not noticed."""
    out: Path
    """Folder of the cache."""
    image_size: int = 256
    """Side of the square images, in pixels."""
    codec: str = "stabilityai/sd-vae-ft-ema"
    """Autoencoder: folder or Hub id."""
    local_diffusers_model_root: Path | None = None
    """Folder that holds autoencoders by name."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """What is stored."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What the autoencoder computes in."""
    batch_size: int = 32
    """Images encoded together."""
    shard_size: int = 4096
    """Images a file; a file is made whole or again."""
    workers: int = 2
    """Threads that read images ahead; 0 = read when needed."""
    timeout: float = 25.0
    """Seconds a thread may be at one image before the job ends and names it."""
    heldout: str | None = None
    """List of images for the held-out part; default heldout.txt where there is one, "" = none."""
    max_per_class: int = 0
    """Use at most this many images of a class, 0 = all."""
    bad: Literal["stop", "skip"] = "stop"
    """What an image does that cannot be read: end the job, or be left out and listed in the manifest."""
    exif: bool = False
    """Turn images as their EXIF orientation says."""
    background: tuple[int, int, int] = (255, 255, 255)
    """Colour behind transparent images."""
    max_pixels: int = 1 << 26
    """Larger images are bad: they are not decoded."""
    device: str | None = None
    """cpu, cuda, …; default cuda where there is one."""


def run(arguments: list[str]) -> int:
    args = parse(EncodeArguments, arguments, "ldit encode")
    from ldit.commands.encode import EncodeJob, encode
    from ldit.log import setup
    from ldit.storage.signals import Stopped

    setup()
    options = {field.name: getattr(args, field.name) for field in fields(args)}
    try:
        whole = encode(EncodeJob(codec_root=options.pop("local_diffusers_model_root"), **options))
    except Stopped as stop:
        print(f"ldit: {stop}: what stands in {args.out} is kept, the same command goes on", file=sys.stderr)
        return stop.code
    if whole:
        print(args.out)
    return 0
