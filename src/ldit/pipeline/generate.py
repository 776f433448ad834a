"""ImageSampler: runs a checked request, as an iterator of events that can be stopped at any step."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldit.codecs.conditioners import TextConditioner
from ldit.codecs.pixels import to_pil, to_uint8
from ldit.errors import RequestError
from ldit.log import logger
from ldit.nn.conditioning import TextCondition
from ldit.pipeline.cascade import seeing, small_latents
from ldit.pipeline.loaded import LoadedModel
from ldit.pipeline.numbers import as_int
from ldit.pipeline.request import ResolvedRequest
from ldit.rng import normal
from ldit.sampling.denoiser import build_denoiser
from ldit.sampling.fast.oom import in_batches
from ldit.sampling.fast.options import InferenceCopy, is_offloaded
from ldit.sampling.guidance import Guided, Network
from ldit.sampling.resolution import positioned
from ldit.sampling.step import Step


@dataclass(frozen=True)
class Preview:
    """The current estimate of images `indices` after solver step `step` of `steps`, as latents (b, C, h, w)."""

    indices: tuple[int, ...]
    step: int
    steps: int
    latents: Tensor


@dataclass(frozen=True)
class Sample:
    """Image `index`, finished: its latent (C, h, w), and unless it is not decoded `tensor` (3, H, W) in [-1, 1] and
    `image`."""

    index: int
    label: int
    seed: int
    latent: Tensor
    tensor: Tensor | None
    image: Image.Image | None


@dataclass(frozen=True)
class Done:
    """The end of a request: number of images, conditional network calls, and rows computed for guidance; seconds;
    whether it was cancelled."""

    images: int
    evaluations: int
    guided_rows: int
    seconds: float
    cancelled: bool


Event = Preview | Sample | Done


@dataclass
class _Counts:
    """The counts for `Done`."""

    images: int = 0
    evaluations: int = 0
    guided_rows: int = 0
    stopped: bool = False


class ImageSampler:
    """Runs a checked request on a model, in batches of `batch_size` images; smaller ones when memory runs out."""

    def __init__(
        self,
        pipe: LoadedModel,
        request: ResolvedRequest,
        *,
        guide: LoadedModel | None = None,
        decode: bool = True,
        batch_size: int = 16,
        progress: bool = False,
        callback: Callable[[Step], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
        preview_every: int = 0,
    ) -> None:
        # Check the options of the call.
        batch_size, preview_every = as_int("batch_size", batch_size), as_int("preview_every", preview_every)
        if batch_size < 1:
            raise RequestError(f"batch_size: must be at least 1, got {batch_size}")
        for name, function in (("callback", callback), ("cancelled", cancelled)):
            if function is not None and not callable(function):
                raise RequestError(f"{name}: expected a function, got {function!r:.80}")
        if guide is not None and guide.device != pipe.device:
            raise RequestError(f"guide: it is on {guide.device}, the model on {pipe.device}")
        self.pipe, self.request, self.guide = pipe, request, guide
        # A `step_noise` function makes noise for the whole request, which therefore runs as one batch. A solver that
        # chooses its own steps gets one image at a time.
        self.batch_size = batch_size if request.step_noise is None else len(request.labels)
        if request.one_by_one:
            self.batch_size = 1
        self.progress, self.callback = progress, callback
        self.cancelled = cancelled or (lambda: False)
        self.preview_every = preview_every
        # Open the codec before sampling, so that a missing one is noticed now; encode the start images.
        self.codec = pipe.codec if decode else None
        self.conditioner = pipe.opened(request.conditioner)
        self._small = None if request.small is None else small_latents(request.small, pipe.codec, request.shape)
        self._starts: Tensor | None = None
        if request.init is not None:
            from ldit.pipeline.init_image import encoded

            self._starts = encoded(request.init, pipe.codec)

    @torch.no_grad()  # applies only while the generator runs: between events the caller's own mode holds
    def events(self) -> Iterator[Event]:
        """Previews, images, and Done at the end. Iterators of one pipeline may run at the same time (see
        `Prepared.for_request`)."""
        # Prepare networks and the message for running out of memory.
        started, counts = time.perf_counter(), _Counts()
        self._ready()
        total, steps = len(self.request.labels), len(self.request.levels) - 1
        advice = "a smaller height and width need less"
        if not is_offloaded(self.pipe.model):
            advice += ", and --offload (offload=True) keeps the blocks on the host"

        with tqdm(
            total=-(-total // self.batch_size) * steps, disable=None if self.progress else True, unit="step"
        ) as bar:

            def halved(size: int, left: int) -> None:
                logger.warning("out of memory: batches of %d from here on, %d images to go", size, left)
                bar.total = bar.n + -(-left // size) * steps

            def run(rows: range) -> Iterator[Event]:
                return self._batch(rows, counts, bar)

            # Batches are halved when memory runs out, unless `step_noise` makes noise for all rows at once.
            smallest = 1 if self.request.step_noise is None else self.batch_size
            yield from in_batches(total, self.batch_size, run, halved, advice, smallest, self._release)
        seconds = time.perf_counter() - started
        yield Done(counts.images, counts.evaluations, counts.guided_rows, seconds, counts.stopped)

    def _ready(self) -> None:
        """Prepare the networks of this request: the model's, and the guide's."""
        self._networks: list[Network] = []
        self._copies: list[InferenceCopy | None] = []
        # Labels stay on the host for inference copies: they look conditioning up there, without waiting for the GPU.
        self._home = self.pipe.device
        for pipe in (self.pipe, self.guide):
            if pipe is None:
                continue
            network = pipe.network
            if isinstance(network, InferenceCopy):
                network = network.for_request()
                self._home = torch.device("cpu") if pipe is self.pipe else self._home
            self._copies.append(network if isinstance(network, InferenceCopy) else None)
            self._networks.append(self._placed(pipe, network if pipe is self.pipe else _guide(network, pipe.dtype)))

    def _release(self) -> bool:
        """Free the CUDA graphs, which hold the memory of all their activations, and continue without them. Returns
        whether there were any."""
        released = [network.release() for network in self._copies if network is not None]
        if any(released):
            logger.warning("out of memory: without CUDA graphs from here on")
        return any(released)

    def _placed(self, pipe: LoadedModel, network: Any) -> Network:
        """The network with the positions and attention scale of the requested size."""
        settings, model = self.request.settings, pipe.spec.model
        rows, columns = (side // model.patch_size for side in self.request.shape[1:])
        return positioned(
            network, self.request.process, model, rows, columns, settings.rope_scaling, settings.proportional_attention
        )

    def _batch(self, rows: range, counts: "_Counts", bar: "tqdm[Any]") -> Iterator[Event]:
        """Previews and images of some rows; nothing after a cancellation. Images count when their batch is complete."""
        if counts.stopped:
            return
        steps = len(self.request.levels) - 1
        # The guided network and the noisiest state, (b, C, h, w).
        predict, x = self._guided(rows), self._initial(rows)
        # Tell inference copies which pairs of time and label will come, so that they compute conditioning once.
        for network, second in zip(self._copies, (False, True), strict=False):
            if network is not None:
                network.plan(predict.network_calls(self.request.levels[:-1], second))
        # Run the solver. After every step: callback, preview, check for cancellation.
        for step in self._steps(predict, x, rows):
            x = step.x
            bar.update()
            if self.callback:
                self.callback(step)
            if self.preview_every and (step.number + 1) % self.preview_every == 0:
                yield Preview(tuple(rows), step.number + 1, steps, step.x0.cpu())
            if self.cancelled():
                counts.stopped = True
                break
        # Decode, unless cancelled.
        if not counts.stopped:
            yield from self._images(rows, x)
            counts.images += len(rows)
        counts.evaluations += predict.evaluations
        counts.guided_rows += predict.guided_rows

    def _steps(self, predict: Guided, x: Tensor, rows: range) -> Iterator[Step]:
        denoise = build_denoiser(self.request.process, predict)
        return self.request.solve(denoise, x, self.request.levels, lambda i: self._noise(i, rows))

    def _guided(self, rows: range) -> Guided:
        """The network with the labels of these rows, and guidance."""
        request = self.request
        cond: Any = self.conditioner.encode(request.labels[rows.start : rows.stop], self._home)
        null: Any = self.conditioner.encode_null(len(rows), self._home)
        if request.negatives and isinstance(self.conditioner, TextConditioner):
            null = self.conditioner.encode_texts(request.negatives[rows.start : rows.stop], self._home)
        if isinstance(cond, TextCondition):
            cond, null = cond.to(self.pipe.dtype), None if null is None else null.to(self.pipe.dtype)
        settings, networks = request.settings, self._networks
        if self._small is not None:
            small = self._small[rows.start : rows.stop] if len(self._small) > 1 else self._small
            networks = [seeing(network, small.to(self.pipe.device)) for network in networks]
        return Guided(
            networks[0],
            cond,
            null,
            settings.guidance,
            request.channels,
            settings.guidance_interval,
            self.pipe.dtype,
            settings.guidance_schedule,
            None if self.guide is None else networks[1],
            request.internal,
        )

    def _initial(self, rows: range) -> Tensor:
        """The noisiest state (b, C, h, w): noise, or start images noised to the first level. Noise depends on the seed
        of each image only."""
        request = self.request
        if request.initial_noise is not None:
            noise = request.initial_noise[rows.start : rows.stop].float()
        else:
            noise = torch.stack([normal(request.shape, request.seeds[row], "picture") for row in rows])
        if self._starts is not None:
            starts = self._starts[rows.start : rows.stop] if len(self._starts) > 1 else self._starts
            noise = request.levels[0].alpha * starts + request.levels[0].sigma * noise
        return noise.to(self.pipe.device)

    def _noise(self, i: int, rows: range) -> Tensor:
        """The noise (b, C, h, w) that solver step `i` adds."""
        request = self.request
        if request.step_noise is not None:
            noise = request.step_noise(i, (len(rows), *request.shape))
        else:
            noise = torch.stack([normal(request.shape, request.seeds[row], "step", i) for row in rows])
        return noise.to(self.pipe.device)

    def _images(self, rows: range, x: Tensor) -> Iterator[Sample]:
        """Decode latents x (b, C, h, w)."""
        request, latents = self.request, x.cpu()
        decoded = None if self.codec is None else self.codec.decode(x).cpu()
        images = None if decoded is None else to_pil(to_uint8(decoded))
        for i, row in enumerate(rows):
            tensor = None if decoded is None else decoded[i]
            image = None if images is None else images[i]
            yield Sample(row, request.labels[row], request.seeds[row], latents[i], tensor, image)


def _guide(network: Any, dtype: torch.dtype) -> Network:
    """A guide's network with inputs converted: it may have another dtype than the model, and needs its conditioning on
    the device unless it is an inference copy."""

    def call(x: Tensor, time: Tensor, cond: Tensor, **more: Any) -> Tensor:
        device = time.device if isinstance(network, InferenceCopy) else x.device
        return network(x.to(dtype), time.to(device), cond.to(device), **more)

    return call
