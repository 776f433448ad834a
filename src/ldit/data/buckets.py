"""Aspect buckets: images keep nearly their shape, and every batch has images of one size (Large-DiT's rule).

A bucket is a size of about `size` x `size` pixels, in steps of a patch, at most four times as long as it is wide. Of
the four buckets that keep most of an image, each epoch chooses one at random; the image is resized to cover it and
cropped at a random place. Numbers are drawn by (seed, epoch) and (seed, position), so the order is the same at every
resume and on any number of processes.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from ldit.data.captions import Captions
from ldit.data.images.decoding import BadImage, dimensions, open_image
from ldit.data.images.image_set import ImageSet, normalise
from ldit.data.images.transforms import random_crop
from ldit.data.samples import Captioned, Samples, Unlabelled
from ldit.errors import DataError
from ldit.storage.shared_job import cut

MOST_RATIO = 4.0
CHOICES = 4  # buckets among which an image's is drawn
_TOGETHER = 4096  # images whose sizes are read at once
Size = tuple[int, int]
"""Width and height in pixels."""


def bucket_sizes(size: int, unit: int, most_ratio: float = MOST_RATIO) -> tuple[Size, ...]:
    """The buckets of images of about `size` x `size` pixels, whose sides are multiples of `unit`: widest first."""
    count = round((size / unit) ** 2)
    width, height, sizes = count, 1, []
    while width > 0:
        if max(width, height) / min(width, height) <= most_ratio:
            sizes.append((width * unit, height * unit))
        if (height + 1) * width <= count:
            height += 1
        else:
            width -= 1
    return tuple(sizes)


def best_buckets(size: Size, sizes: Sequence[Size], count: int = CHOICES) -> tuple[int, ...]:
    """The places in `sizes` of the `count` buckets that keep the largest share of an image, the best first."""

    def share(place: int) -> tuple[float, Size]:
        scales = [bucket / own for bucket, own in zip(sizes[place], size, strict=True)]
        return min(scales) / max(scales), sizes[place]

    return tuple(sorted(range(len(sizes)), key=share, reverse=True)[:count])


def images_of(data: Samples) -> ImageSet | None:
    """The images of a set, whatever is wrapped around them; None where it holds none."""
    while isinstance(data, (Unlabelled, Bucketed)):
        data = data.data
    return data if isinstance(data, ImageSet) else None


def _has_files(images: ImageSet) -> bool:
    try:
        return images.source(0) is not None
    except DataError:  # a bad image
        return True


class BucketOrder:
    """Which sample is at a position of the stream, and the bucket of every batch.

    An epoch has size // batch batches. Samples that fill no batch of their bucket wait for another epoch, where chance
    gives them another bucket; the largest such rests are filled up with samples of their bucket.
    """

    def __init__(self, choices: np.ndarray, batch: int, seed: int) -> None:
        """`choices` (N, K): the buckets among which each sample's is drawn."""
        self.choices, self.batch, self.seed = choices, batch, seed
        self.batches = max(1, len(choices) // batch)
        self._epoch = -1
        self._indices = np.empty((0, batch), np.int32)
        self._buckets: list[int] = []

    def between(self, first: int, last: int) -> list[int]:
        """Sample indices at positions first … last-1."""
        return [int(self._plan(p)[0][p % self.batch]) for p in range(first, last)]

    def bucket_at(self, position: int) -> int:
        """The bucket of the batch that this position is in."""
        return self._plan(position)[1]

    def _plan(self, position: int) -> tuple[np.ndarray, int]:
        """The samples and the bucket of the batch that this position is in."""
        epoch, place = divmod(position // self.batch, self.batches)
        if epoch != self._epoch:
            self._draw(epoch)
        return self._indices[place], self._buckets[place]

    def _draw(self, epoch: int) -> None:
        generator = torch.Generator().manual_seed(self.seed + epoch)
        size, count = self.choices.shape
        shuffled = torch.randperm(size, generator=generator).numpy()
        drawn = torch.randint(count, (size,), generator=generator).numpy()
        buckets = self.choices[shuffled, drawn[shuffled]]
        # Whole batches of each bucket, then the largest rests, filled up.
        batches: list[tuple[int, np.ndarray]] = []
        rests: list[tuple[int, int, np.ndarray]] = []
        for bucket in np.unique(buckets).tolist():
            own = shuffled[buckets == bucket]
            whole = len(own) // self.batch
            batches += [(bucket, own[i * self.batch : (i + 1) * self.batch]) for i in range(whole)]
            if rest := len(own) % self.batch:
                filled = np.resize(np.concatenate([own[whole * self.batch :], own]), self.batch)
                rests.append((-rest, bucket, filled))
        rests.sort(key=lambda row: row[:2])
        batches += [(bucket, own) for _, bucket, own in rests[: self.batches - len(batches)]]
        order = torch.randperm(len(batches), generator=generator).tolist()
        self._indices = np.stack([batches[i][1] for i in order]).astype(np.int32)
        self._buckets = [batches[i][0] for i in order]
        self._epoch = epoch


class Bucketed:
    """A set of image files in aspect buckets. `read` cuts an image to the height and width of `out`."""

    def __init__(self, data: Samples, sizes: Sequence[Size], workers: int = 4) -> None:
        """Reads the header of every image for its size. A bad image counts as square: reading it says what is wrong.
        DataError for a set that is not made of image files."""
        images = images_of(data)
        if images is None or not _has_files(images):
            raise DataError(f"data.buckets: {data.root} is not made of image files")
        self.data, self.images, self.sizes = data, images, tuple(sizes)
        self.root, self.num_before_cap, self.cache = data.root, data.num_before_cap, None
        self.shape, self.names = data.shape, data.names
        self._label = images.label
        if isinstance(data, Captioned):
            self._label = images.caption_row
        elif isinstance(data, Unlabelled):
            self._label = lambda index: 0
        with ThreadPoolExecutor(max(1, workers), "sizes") as pool:
            # Some at a time: a future is larger than the size that it finds.
            own: list[Size] = []
            for rows in cut(len(images), _TOGETHER):
                own += pool.map(self._dimensions, rows)
        best = {size: best_buckets(size, self.sizes) for size in dict.fromkeys(own)}
        self.choices = np.array([best[size] for size in own], np.int16)  # (N, 4)

    def __len__(self) -> int:
        return len(self.images)

    def order(self, batch: int, seed: int) -> BucketOrder:
        return BucketOrder(self.choices, batch, seed)

    def shape_of(self, bucket: int) -> tuple[int, int, int]:
        """(3, height, width) of a bucket's images."""
        width, height = self.sizes[bucket]
        return 3, height, width

    def read(self, index: int, flip: bool, out: np.ndarray, place: tuple[float, float] = (0.5, 0.5)) -> int:
        """Fill `out`, float32 (3, height, width), from the part of the image at `place`; returns the label."""
        source = self.images.source(index)
        assert source is not None
        try:
            image = open_image(source, self.images.decoding)
        except BadImage as error:
            raise DataError(f"cannot read image {self.root / self.where(index)}: {error}") from None
        pixels = np.asarray(random_crop(image, out.shape[2], out.shape[1], *place))
        normalise(pixels[:, ::-1] if flip else pixels, out)
        return self._label(index)

    def where(self, index: int) -> str:
        return self.data.where(index)

    def fingerprint(self) -> str:
        """sha256 of the set and of the buckets of its images, on which the order depends."""
        return hashlib.sha256(self.data.fingerprint().encode() + self.choices.tobytes()).hexdigest()

    def captions(self) -> Captions:
        return self.data.captions()

    def caption_row(self, index: int) -> int:
        return self.data.caption_row(index)

    def _dimensions(self, index: int) -> Size:
        try:
            source = self.images.source(index)
            assert source is not None
            return dimensions(source, self.images.decoding) or (1, 1)
        except DataError:
            return 1, 1
