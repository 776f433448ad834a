"""`ldit convert SOURCE OUT --to ldit|original|diffusers|pt`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ldit.cli.arguments import parse


@dataclass(frozen=True)
class ConvertArguments:
    """Write a checkpoint in another layout. Raw and EMA weights both travel where both are there; an autoencoder's EMA
    weights become a codec's folder (diffusers). A codec given by path is copied into an ldit export."""

    source: Annotated[str, tyro.conf.Positional]
    """Folder, run, DiT .pt file, bundled name or Hub id."""
    out: Annotated[Path, tyro.conf.Positional]
    """Folder (a file for pt) that does not exist yet."""
    to: Literal["ldit", "original", "diffusers", "pt"] = "ldit"
    """Target layout."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Dtype of the weights written (ldit and diffusers); default as they are."""
    ema_only: bool = False
    """Write the EMA weights as the only ones, as diffusers always has them."""
    heads: int | None = None
    """Attention heads of a DiT .pt of an unlisted size."""
    process: Literal["ddpm", "flow"] | None = None
    """What a .pt was trained as: ddpm = DiT, flow = SiT; default what its settings or its name say, else ddpm."""


def run(arguments: list[str]) -> int:
    args = parse(ConvertArguments, arguments, "ldit convert")
    from ldit.commands.convert import convert

    print(convert(args.source, args.out, args.to, args.dtype, args.ema_only, args.heads, args.process))
    return 0
