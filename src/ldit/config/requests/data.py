"""The request of `ldit data check`."""

from dataclasses import dataclass, field

from ldit.config.requests.fields import flag
from ldit.config.sections import DataConfig


@dataclass(frozen=True)
class CheckRequest:
    """Options: which images are checked, and how they are decoded."""

    path: str = field(metadata=flag(positional=True))
    """Images to check: anything that data.path takes (class folders, loose images, tars, metadata.jsonl, IDX files, a
    latent cache, emoji64)."""
    heldout: str | None = None
    """File, in the folder of the images, that lists the held-out ones. Default: heldout.txt where there is one; "" =
    none."""
    image_size: int | None = None
    """Training size in pixels: images with a shorter side are counted."""
    exif: bool = False
    """Apply the EXIF orientation of images."""
    background: tuple[int, int, int] = (255, 255, 255)
    """Colour behind transparent images."""
    max_pixels: int = 1 << 26
    """Most pixels of an image; larger images count as bad."""
    workers: int = 2
    """Threads that read images."""
    timeout: float = DataConfig.timeout
    """Seconds that reading one image may take; one that takes longer counts as bad (data.timeout of a run)."""
    json: bool = False
    """Print the report as one JSON object."""
