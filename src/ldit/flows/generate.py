"""Seeds to pictures: the only way pictures are made. An iterable of events that can be stopped at any step."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldit.codecs.pixels import to_pil, to_uint8
from ldit.diffusion.build import build_process
from ldit.errors import RequestError
from ldit.flows.request import Request
from ldit.rng import normal
from ldit.sampling.denoiser import build_denoiser
from ldit.sampling.guidance import Guided
from ldit.sampling.step import Step

if TYPE_CHECKING:
    from ldit.flows.pipeline import Pipeline


@dataclass(frozen=True)
class Preview:
    """The estimate of pictures `indices` after solver step `step` of `steps`; latents (b, C, h, w)."""

    indices: tuple[int, ...]
    step: int
    steps: int
    latents: Tensor


@dataclass(frozen=True)
class Picture:
    """Picture `index`, finished. Without a codec `tensor` (3, H, W) in [-1, 1] and `image` are absent."""

    index: int
    label: int
    seed: int
    latent: Tensor
    tensor: Tensor | None
    image: Image.Image | None


@dataclass(frozen=True)
class Done:
    """The end: pictures made, conditional network calls, null rows of guidance, seconds, whether cancelled."""

    pictures: int
    evaluations: int
    guided_rows: int
    seconds: float
    cancelled: bool


Event = Preview | Picture | Done


class Generator:
    """Runs a checked request on a pipeline, in batches of `batch_size` pictures."""

    def __init__(
        self,
        pipe: "Pipeline",
        request: Request,
        *,
        decode: bool = True,
        batch_size: int = 16,
        progress: bool = False,
        callback: Callable[[Step], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
        preview_every: int = 0,
    ) -> None:
        if batch_size < 1:
            raise RequestError(f"batch_size: must be at least 1, got {batch_size}")
        self.pipe, self.request = pipe, request
        # Noise given from outside is for the whole request, so it runs as one batch.
        self.batch_size = batch_size if request.step_noise is None else len(request.labels)
        self.progress, self.callback = progress, callback
        self.cancelled = cancelled or (lambda: False)
        self.preview_every = preview_every
        self.codec = pipe.codec if decode else None  # opened before sampling, so that a missing one stops it here
        self.process = build_process(pipe.spec.process)

    @torch.no_grad()  # wraps each resumption, so that the caller's own mode stands between events
    def events(self) -> Iterator[Event]:
        """Previews, pictures, and Done last."""
        started = time.perf_counter()
        done, evaluations, guided_rows, stop = 0, 0, 0, False
        count, steps = len(self.request.labels), len(self.request.levels) - 1
        batches = range(0, count, self.batch_size)
        with tqdm(total=len(batches) * steps, disable=None if self.progress else True, unit="step") as bar:
            for first in batches:
                rows = range(first, min(first + self.batch_size, count))
                predict = self._guided(rows)
                x = self._initial(rows)
                for step in self._steps(predict, x, rows):
                    x = step.x
                    bar.update()
                    if self.callback:
                        self.callback(step)
                    if self.preview_every and (step.number + 1) % self.preview_every == 0:
                        yield Preview(tuple(rows), step.number + 1, steps, step.x0.cpu())
                    if stop := self.cancelled():
                        break
                evaluations += predict.evaluations
                guided_rows += predict.guided_rows
                if stop:
                    break
                yield from self._pictures(rows, x)
                done += len(rows)
        yield Done(done, evaluations, guided_rows, time.perf_counter() - started, stop)

    def _steps(self, predict: Guided, x: Tensor, rows: range) -> Iterator[Step]:
        denoise = build_denoiser(self.process, predict)
        return self.request.solve(denoise, x, self.request.levels, lambda i: self._noise(i, rows))

    def _guided(self, rows: range) -> Guided:
        request, model = self.request, self.pipe.model
        labels = torch.tensor(request.labels[rows.start : rows.stop], device=self.pipe.device)
        null = None if request.null is None else torch.full_like(labels, request.null)
        settings = request.settings
        interval = settings.guidance_interval
        return Guided(model, labels, null, settings.guidance, request.channels, interval, self.pipe.dtype)

    def _initial(self, rows: range) -> Tensor:
        request = self.request
        if request.initial_noise is not None:
            noise = request.initial_noise[rows.start : rows.stop].float()
        else:
            noise = torch.stack([normal(request.shape, request.seeds[row], "picture") for row in rows])
        return noise.to(self.pipe.device)

    def _noise(self, i: int, rows: range) -> Tensor:
        request = self.request
        if request.step_noise is not None:
            noise = request.step_noise(i, (len(rows), *request.shape))
        else:
            noise = torch.stack([normal(request.shape, request.seeds[row], "step", i) for row in rows])
        return noise.to(self.pipe.device)

    def _pictures(self, rows: range, x: Tensor) -> Iterator[Picture]:
        request, latents = self.request, x.cpu()
        decoded = None if self.codec is None else self.codec.decode(x).cpu()
        images = None if decoded is None else to_pil(to_uint8(decoded))
        for i, row in enumerate(rows):
            tensor = None if decoded is None else decoded[i]
            image = None if images is None else images[i]
            yield Picture(row, request.labels[row], request.seeds[row], latents[i], tensor, image)
