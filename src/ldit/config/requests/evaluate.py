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
    """inception, efficientnet-lite0, or the run of a classifier (`ldit train extractor-small`)."""
    inception_weights: Path | None = None
    """The file of Inception's weights. Default: where LDIT_INCEPTION_WEIGHTS says, or a cache."""


@dataclass(frozen=True, kw_only=True)
class EvaluateRequest(Features, ModelRequest):
    """Metrics: what `ldit evaluate` is asked for."""

    source: str = field(metadata=flag(positional=True, group="What"))
    """A checkpoint (whatever `ldit sample` takes), or images: a folder, PATH@heldout or PATH@train for the parts of
    its held-out list, an .npz with arr_0, or the bundled "emoji64"."""
    reference: str = field(metadata=flag(group="What"))
    """An .npz of statistics (guided-diffusion's, or of `ldit stats`) or of images, a folder, or a bundled set."""
    num: int | None = field(default=None, metadata=flag(group="What"))
    """Images. Default: 50,000 of a checkpoint, else all that are there."""
    image_size: int | None = field(default=None, metadata=flag(group="What"))
    """Side to which images of folders are cut. Default: the shorter side of the first, a reference as the source."""
    metrics: tuple[str, ...] = ()
    """Some of fd (fid), sfid, is, pr, kid. Default: all that the extractor and the reference allow."""
    components: int = 0
    """Also the Fréchet distance in so many principal components of the reference, for sets too small for all."""
    bootstrap: int = 0
    """Resamples for its 95 % interval, such as 1000."""
    batch_size: int = 50
    """Images that are sampled, and go through the extractor, together."""
    json: Path | None = field(default=None, metadata=flag(group="Files"))
    """File for the report."""
    figure: Path | None = field(default=None, metadata=flag(group="Files"))
    """PNG or SVG of the metrics, of both sets in two principal components, and of the classes."""


@dataclass(frozen=True, kw_only=True)
class StatsRequest(Features):
    """What: statistics of a set of images, as a file (`ldit stats`)."""

    images: str = field(metadata=flag(positional=True))
    """Folder of images of any kind that `data.path` takes, PATH@heldout or PATH@train for the parts of its held-out
    list, .npz with arr_0, or the bundled "emoji64"."""
    out: Path
    """The .npz; replaced if it exists."""
    num: int | None = None
    """Use so many images, spread over the set (the first ones of an .npz). Default: all."""
    image_size: int | None = None
    """Side to which images of a folder are cut. Default: the shorter side of the first."""
    batch_size: int = 50
    """Images that go through the extractor together."""
    device: str | None = None
    """cpu, cuda, … Default: cuda where there is one."""
