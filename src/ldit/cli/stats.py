"""`ldit stats IMAGES --out FILE.npz`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ldit.cli.arguments import parse


@dataclass(frozen=True)
class StatsArguments:
    """The features' mean and covariance of a set of images, in a file that stands for it as a reference of
    `ldit evaluate`. torchrun shares the work among processes."""

    images: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PICTURES")]
    """Folder of images of any kind that `data.path` takes, PATH@heldout or PATH@train for the parts of its held-out
    list, .npz with arr_0, or the bundled "emoji64"."""
    out: Path
    """The .npz; replaced if it exists."""
    num: int | None = None
    """Use so many images, spread over the set (the first ones of an .npz); default all."""
    image_size: int | None = None
    """Side to which images of a folder are cut; default the shorter side of the first."""
    extractor: str = "inception"
    """inception, efficientnet-lite0, or the run of a classifier (`ldit train extractor-small`)."""
    inception_weights: Path | None = None
    """The file of Inception's weights; default where LDIT_INCEPTION_WEIGHTS says, or a cache."""
    batch_size: int = 50
    """Images that go through the extractor together."""
    device: str | None = None
    """cpu, cuda, …; default cuda where there is one."""


def run(arguments: list[str]) -> int:
    args = parse(StatsArguments, arguments, "ldit stats")
    from ldit.eval.evaluate import ExtractorJob, save_statistics
    from ldit.log import setup

    setup()
    extractor = ExtractorJob(args.extractor, args.inception_weights)
    count = save_statistics(args.images, args.out, args.num, args.image_size, extractor, args.batch_size, args.device)
    print(f"{count:,} images: {args.out}")
    return 0
