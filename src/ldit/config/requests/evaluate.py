"""The requests that measure images: `ldit evaluate` and `ldit stats`."""

from dataclasses import dataclass, field
from pathlib import Path

from ldit.config.requests.fields import flag
from ldit.config.requests.sampling import ModelRequest

EXTRACTOR = "inception"


@dataclass(frozen=True, kw_only=True)
class Features:
    """Features: the network whose features are compared."""

    extractor: str = EXTRACTOR
    """Network for the features: inception, efficientnet-lite0, or the run directory of a classifier (`ldit train
    extractor-small`)."""
    inception_weights: Path | None = None
    """File of Inception's weights. Default: the file that LDIT_INCEPTION_WEIGHTS names, else one in the cache of
    torch.hub or Hugging Face."""
    fetch: bool = False
    """Download Inception's published weights (96 MB) into torch.hub's cache, if they are not there; their hash is
    checked."""
    protocol: str | None = None
    """How images are resized and scaled for Inception: adm (guided-diffusion, the default), torch-fidelity (the same),
    pytorch-fid, or clean-fid. Distances of images that were resized differently are not comparable."""


@dataclass(frozen=True, kw_only=True)
class EvaluateRequest(Features, ModelRequest):
    """Metrics: what `ldit evaluate` measures."""

    source: str = field(metadata=flag(positional=True, group="What"))
    """What is measured: a checkpoint (anything that `ldit sample` takes), whose images are sampled now, or existing
    images: a folder, PATH@heldout or PATH@train for the parts of its held-out list, an .npz with arr_0, or the bundled
    "emoji64"."""
    others: tuple[str, ...] = field(default=(), metadata=flag(positional=True, group="What", metavar="[SOURCE ...]"))
    """Further sources, measured against the same reference in the same way: one table has all of them, and what differs
    between their configurations."""
    reference: str = field(metadata=flag(group="What"))
    """What it is compared with: an .npz of statistics (from guided-diffusion or `ldit stats`) or of images, a folder of
    images, or a bundled set."""
    num: int | None = field(default=None, metadata=flag(group="What"))
    """Number of images. Default: 50,000 samples of a checkpoint, or all existing images."""
    image_size: int | None = field(default=None, metadata=flag(group="What"))
    """Side in pixels to which images of folders are resized and cropped. Default: the shorter side of the first image;
    for the reference the size of the source."""
    metrics: tuple[str, ...] = ()
    """Metrics to compute: some of fd (fid), sfid, is, pr (precision and recall), kid. Default: all that the extractor
    and the reference allow."""
    components: int = 0
    """Compute the Fréchet distance also in this many principal components of the reference, for sets too small for the
    whole covariance; 0 = off."""
    bootstrap: int = 0
    """Resamples, such as 1000, for a 95 % interval of that distance; 0 = no interval."""
    matcher: str | None = None
    """Image-caption matcher, a folder or the bundled emoji64-matcher: measures how well images follow their prompts
    (caption_rank, caption_top1); with the extractor efficientnet-lite0."""
    batch_size: int = 50
    """Images that are sampled, and go through the extractor, at once."""
    json: Path | None = field(default=None, metadata=flag(group="Files"))
    """File for the report as JSON."""
    figure: Path | None = field(default=None, metadata=flag(group="Files"))
    """PNG or SVG file for charts of one source: the metrics, both sets in two principal components, and the classes."""


@dataclass(frozen=True, kw_only=True)
class StatsRequest(Features):
    """What: a set of images whose statistics are written to a file (`ldit stats`)."""

    images: str = field(metadata=flag(positional=True))
    """Images: anything that `data.path` takes, PATH@heldout or PATH@train for the parts of its held-out list, an .npz
    with arr_0, or the bundled "emoji64"."""
    out: Path
    """The .npz file to write; replaced if it exists."""
    num: int | None = None
    """Use only this many images, spread over the set (of an .npz the first ones). Default: all."""
    keep_images: int = 0
    """Also store this many of them, in guided-diffusion's key arr_0: for precision, recall and KID against the file."""
    image_size: int | None = None
    """Side in pixels to which images of a folder are resized and cropped. Default: the shorter side of the first
    image."""
    batch_size: int = 50
    """Images that go through the extractor at once."""
    device: str | None = None
    """cpu, cuda, … Default: cuda where there is one."""
