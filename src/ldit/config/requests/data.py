"""The request of `ldit data check`."""

from dataclasses import dataclass, field

from ldit.config.requests.fields import flag
from ldit.config.sections import DataConfig


@dataclass(frozen=True)
class CheckRequest:
    """Options: a set of images that is decoded and reported on."""

    path: str = field(metadata=flag(positional=True))
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
    timeout: float = DataConfig.timeout
    """Seconds that a thread may spend on one image, as data.timeout; one that takes longer is bad."""
    json: bool = False
    """One JSON object with everything found."""
