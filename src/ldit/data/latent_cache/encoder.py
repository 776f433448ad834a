"""Encodes ranges of images to the tensors of a latent cache's shards."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from ldit.data.latent_cache.job import EncodedShard, Part
from ldit.data.samples import Samples
from ldit.data.workers import Job, Stuck, Workers
from ldit.errors import DataError, RunError
from ldit.log import logger
from ldit.precision import DTYPES

Moments = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Images (B, 3, S, S) -> mean and log-variance (B, C, h, w): an autoencoder's posterior."""


class Encoder:
    """Encodes ranges of samples. While the codec works on a batch, threads read the next one.

    On a CPU each image is encoded by itself on one core, several images side by side: a sum over several threads
    depends on their number, and a cache must not depend on the number of cores or processes. It is not slower (the
    default codec at 256 px, 2 cores: 1.5 s an image; in batches on both cores 1.7 s).
    """

    def __init__(
        self,
        moments: Moments,
        device: torch.device,
        batch_size: int,
        workers: int,
        skip: bool,
        timeout: float,
        progress: Callable[[int], None],
    ) -> None:
        """`skip`: leave out bad images. `timeout`: seconds that reading one image may take. `progress` is called with
        the number of images of each batch."""
        self.codec_moments, self.device, self.batch_size, self.skip = moments, device, batch_size, skip
        self.progress = progress
        self.timeout = timeout
        self.workers = Workers(workers, "encode") if workers else None
        # On a CPU a thread for each core, which computes on that core alone.
        self.cores = torch.get_num_threads() if device.type == "cpu" else 0
        self.computers = ThreadPoolExecutor(self.cores, "codec", torch.set_num_threads, (1,)) if self.cores else None

    def close(self) -> None:
        """End the threads, each after its current image; a thread that hangs is left behind."""
        if self.workers is not None:
            self.workers.close(1.0)
        if self.computers is not None:
            self.computers.shutdown(cancel_futures=True)
            torch.set_num_threads(self.cores)

    def shard(self, samples: Samples, part: Part, rows: range) -> EncodedShard:
        """The latents of images `rows`. DataError names the first bad image, unless bad ones are skipped; RunError one
        that takes too long."""
        # Memory for the whole shard; moments are (N, 2, C, h, w).
        shape, dtype = part.job.shape, DTYPES[part.job.dtype]
        moments = [torch.empty(len(rows), *shape, dtype=dtype) for _ in range(2)]
        label = torch.empty(len(rows), dtype=torch.int64)
        skipped: list[tuple[str, str]] = []
        count = 0
        for batch in self._batches(samples, rows):
            # Wait for the images, then encode them and their mirror images.
            reasons = batch.wait(self.timeout)
            if not self.skip and any(reasons):
                raise DataError(next(filter(None, reasons)))
            mean, logvar = (m.to(dtype) for m in self._moments(batch.images, shape))
            # Bad images, and those with latents that are not finite, are left out or end the job.
            finite = (mean.isfinite() & logvar.isfinite()).flatten(1).all(1).tolist()
            kept = []
            for row, index in enumerate(batch.rows):
                reason = reasons[row] or ("" if finite[row] else "its latents are not finite")
                if reason and not self.skip:
                    raise DataError(f"cannot encode image {samples.root / samples.where(index)}: {reason}")
                if reason:
                    skipped.append((samples.where(index), _plain(reason, samples, index)))
                    logger.warning("left out: %s: %s", *skipped[-1])
                else:
                    kept.append(row)
            # Append the others to the shard.
            place = slice(count, count + len(kept))
            for shard, values in zip(moments, (mean, logvar), strict=True):
                shard[place] = values[kept]
            label[place] = torch.tensor(batch.labels)[kept]
            count = place.stop
            self.progress(len(batch.rows))
        return EncodedShard(moments[0][:count], moments[1][:count], label[:count], skipped)

    def _batches(self, samples: Samples, rows: range) -> Iterator["_Reading"]:
        """Batches of `rows`; the next one is read while the caller works on one."""
        cuts = [rows[at : at + self.batch_size] for at in range(0, len(rows), self.batch_size)]
        ahead = _Reading(samples, cuts[0], self.workers)
        for cut in cuts[1:]:
            batch, ahead = ahead, _Reading(samples, cut, self.workers)
            yield batch
        yield ahead

    def _moments(self, images: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(B, 3, S, S) -> mean and logvar, each (B, 2, C, h, w) fp32 on the CPU: of the images and mirror images."""
        images = images.to(self.device)
        both = [self._computed(images), self._computed(images.flip(-1))]
        mean, logvar = (torch.stack(pair, dim=1).cpu() for pair in zip(*both, strict=True))
        if tuple(mean.shape[1:]) != tuple(shape) or mean.shape != logvar.shape:
            raise DataError(f"the codec's moments are {tuple(mean.shape[2:])}, expected {tuple(shape[1:])}")
        return mean, logvar

    def _computed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if self.computers is None:
            return self.codec_moments(images)
        means, logvars = zip(*self.computers.map(self.codec_moments, images.split(1)), strict=True)
        return torch.cat(means), torch.cat(logvars)


class _Reading:
    """A batch of images, read by threads, or without threads by `wait`."""

    def __init__(self, samples: Samples, rows: range, workers: Workers | None) -> None:
        self.samples, self.rows = samples, rows
        self.images = torch.zeros(len(rows), *samples.shape)
        self.labels: list[int] = [0] * len(rows)
        self._view: np.ndarray = self.images.numpy()
        self._reasons = [""] * len(rows)
        self._reading: list[Job] | None = None
        if workers is not None:
            self._reading = [workers.submit(lambda job, row=row: self._read(row, job)) for row in range(len(rows))]  # type: ignore[misc]

    def _read(self, row: int, job: Job | None = None) -> None:
        """Fill a row, with zeros if its image cannot be read."""
        if job is not None:
            job.at(row)
        try:
            self.labels[row] = self.samples.read(self.rows[row], False, self._view[row])
        except DataError as error:
            self._view[row] = 0
            self._reasons[row] = str(error) or "cannot be read"

    def wait(self, timeout: float) -> list[str]:
        """Wait until all images are read; returns what is wrong with each, "" = nothing. RunError names an image that
        takes longer than `timeout` seconds."""
        for row in range(len(self.rows)):
            if self._reading is None:
                self._read(row)
                continue
            try:
                self._reading[row].finish(timeout)
            except Stuck as stuck:
                where = self.samples.where(self.rows[row])
                raise RunError(f"{self.samples.root}: {where} cannot be read: {stuck} (--timeout)") from None
        return self._reasons


def _plain(reason: str, samples: Samples, index: int) -> str:
    """The reason without the image's name, which is recorded beside it, and without the set's folder."""
    name = str(samples.root / samples.where(index))
    return reason.removeprefix(f"cannot read image {name}: ").replace(f"{samples.root}/", "")
