"""`ldit data check PATH [--json]`."""

import json
from dataclasses import dataclass
from typing import Annotated

import tyro

from ldit.cli.arguments import parse
from ldit.errors import ConfigError


@dataclass(frozen=True)
class CheckArguments:
    """Decode every image of a set and say what it holds. Exit code 1 when anything is bad."""

    path: Annotated[str, tyro.conf.Positional]
    """What data.path may be: class folders, loose images, tars, metadata.jsonl, IDX files, a cache, emoji64."""
    image_size: int | None = None
    """Count the images that would be enlarged to this size."""
    exif: bool = False
    """Turn images as their EXIF orientation says."""
    background: tuple[int, int, int] = (255, 255, 255)
    """Colour behind transparent images."""
    max_pixels: int = 1 << 26
    """Larger images are bad."""
    workers: int = 2
    """Threads that read."""
    timeout: float = 25.0
    """Seconds that a thread may be at one image, as data.timeout; one that takes longer is bad."""
    json: bool = False
    """One JSON object with everything found."""


def run(arguments: list[str]) -> int:
    theme = arguments[0] if arguments and not arguments[0].startswith("-") else None
    if theme != "check" and not (theme is None and {"-h", "--help"} & set(arguments)):
        raise ConfigError(f"ldit data needs a theme: check (got {theme!r})")
    args = parse(CheckArguments, arguments[1:] if theme else arguments, "ldit data check")
    from ldit.data.check.report import CheckJob, as_json, as_text, check_data

    result = check_data(
        CheckJob(
            args.path, args.image_size, args.exif, args.background, args.max_pixels, args.workers,
            args.timeout,
        )
    )  # fmt: skip
    if args.json:
        print(json.dumps(as_json(result)))
    else:
        for line in as_text(result):
            print(_printable(line))
    return 0 if result.sound else 1


def _printable(line: str) -> str:
    """File names come from outside: control characters and broken UTF-8 are shown by their codes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
