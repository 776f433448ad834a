"""`ldit info SOURCE [--json] [--verify]`."""

import json
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from ldit.cli.arguments import parse


@dataclass(frozen=True)
class InfoArguments:
    """Say what a checkpoint, an autoencoder, a classifier or a codec's folder is, from headers and shapes alone."""

    source: Annotated[str, tyro.conf.Positional]
    """Folder, run, DiT .pt file, bundled name or Hub id."""
    json: bool = False
    """One JSON object."""
    verify: bool = False
    """Read and check every file."""
    heads: int | None = None
    """Attention heads of a DiT .pt of an unlisted size."""
    process: Literal["ddpm", "flow"] | None = None
    """What a .pt was trained as: ddpm = DiT, flow = SiT; default what its settings or its name say, else ddpm."""


def run(arguments: list[str]) -> int:
    args = parse(InfoArguments, arguments, "ldit info")
    from ldit.commands.info import describe

    report = describe(args.source, args.verify, args.heads, args.process)
    if args.json:
        print(json.dumps(report))
    else:
        for key, value in report.items():
            print(f"{key:<12}{json.dumps(value) if isinstance(value, (dict, list)) else value}")
    return 0
