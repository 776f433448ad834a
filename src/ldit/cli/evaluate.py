"""`ldit evaluate SOURCE --reference REFERENCE`."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from ldit.cli.arguments import parse
from ldit.cli.sampler import SamplerArguments


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments(SamplerArguments):
    """Measure images: FID and its kin in any features, Inception Score, precision, recall, KID. A checkpoint's
    images are made and kept nowhere; torchrun shares the work among processes."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A checkpoint (whatever `ldit sample --ckpt` takes), or images: a folder, PATH@heldout or PATH@train for the
    parts of its held-out list, an .npz with arr_0, or the bundled "emoji64"."""
    reference: str
    """An .npz of statistics (guided-diffusion's, or of `ldit stats`) or of images, a folder, or a bundled set."""
    num: int | None = None
    """Images; default 50,000 of a checkpoint, else all that are there."""
    extractor: str = "inception"
    """inception, efficientnet-lite0, or the run of a classifier (`ldit train extractor-small`)."""
    inception_weights: Path | None = None
    """The file of Inception's weights; default where LDIT_INCEPTION_WEIGHTS says, or a cache."""
    metrics: tuple[str, ...] = ()
    """Some of fd (fid), sfid, is, pr, kid; default all that the extractor and the reference allow."""
    components: int = 0
    """Also the Fréchet distance in so many principal components of the reference, for sets too small for all."""
    bootstrap: int = 0
    """Resamples for its 95 % interval, such as 1000."""
    image_size: int | None = None
    """Side to which images of folders are cut; default the shorter side of the first, a reference as the source."""
    batch_size: int = 50
    """Images that are sampled, and go through the extractor, together."""
    json: Path | None = None
    """File for the report."""
    figure: Path | None = None
    """PNG of the figures, of both sets in two principal components, and of the classes."""


def run(arguments: list[str]) -> int:
    args = parse(EvaluateArguments, arguments, "ldit evaluate")
    from ldit.eval.evaluate import EvaluateJob, ExtractorJob, evaluate
    from ldit.log import setup

    setup()
    job = EvaluateJob(
        images=args.job(args.source),
        reference=args.reference,
        num=args.num,
        rule=args.labels,
        extractor=ExtractorJob(args.extractor, args.inception_weights),
        metrics=args.metrics,
        components=args.components,
        resamples=args.bootstrap,
        image_size=args.image_size,
        json=args.json,
        figure=args.figure,
    )
    evaluate(job, partial(print, flush=True))  # what cannot be said is known at once
    return 0
