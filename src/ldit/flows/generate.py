"""Seeds to pictures: the only way pictures are made. An iterable of events that can be stopped at any step."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldit.codecs.pixels import to_pil, to_uint8
from ldit.config.labels import resolve_label
from ldit.config.spec import DDPMConfig, SamplingConfig
from ldit.diffusion.build import build_process
from ldit.diffusion.flow import Flow
from ldit.errors import RequestError
from ldit.rng import normal
from ldit.sampling.denoiser import build_denoiser
from ldit.sampling.guidance import Guided
from ldit.sampling.levels import Level, ddpm_levels, flow_levels
from ldit.sampling.solvers import Step, find_solver

if TYPE_CHECKING:
    from ldit.flows.pipeline import Pipeline

StepNoise = Callable[[int, tuple[int, ...]], Tensor]


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
    """One request, checked at construction (RequestError names what cannot be served), run by `events`."""

    def __init__(
        self,
        pipe: "Pipeline",
        class_labels: Sequence[int | str] | None,
        *,
        steps: int | str | None = None,
        solver: str | None = None,
        guidance: float | None = None,
        guidance_channels: int | Literal["all"] | None = None,
        guidance_interval: tuple[float, float] | None = None,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        height: int | None = None,
        width: int | None = None,
        batch_size: int = 16,
        progress: bool = False,
        callback: Callable[[Step], None] | None = None,
        initial_noise: Tensor | None = None,
        step_noise: StepNoise | None = None,
        prompts: Sequence[str] | None = None,
        decode: bool = True,
        cancelled: Callable[[], bool] | None = None,
        preview_every: int = 0,
    ) -> None:
        self.pipe, self.spec = pipe, pipe.spec
        if prompts is not None or self.spec.model.kind == "text":
            raise RequestError("text-to-image sampling is not built yet")
        if not class_labels:
            raise RequestError("name at least one class label")
        self.labels = [
            resolve_label(label, self.spec.model.num_classes, self.spec.class_names) for label in class_labels
        ]
        self.settings = _merge(
            self.spec.sampling_defaults, steps, solver, guidance, guidance_channels, guidance_interval
        )
        self.solve = find_solver(self.settings.solver)
        self.levels = self._levels(steps)
        self.channels = self._channels()
        self._check_guidance()
        self.seeds = _seeds(seed, seeds, len(self.labels))
        self.shape = self._latent_shape(height, width)
        if batch_size < 1:
            raise RequestError(f"batch_size: must be at least 1, got {batch_size}")
        self.batch_size, self.progress, self.callback = batch_size, progress, callback
        expected = (len(self.labels), *self.shape)
        if initial_noise is not None and tuple(initial_noise.shape) != expected:
            raise RequestError(f"initial_noise: shape {tuple(initial_noise.shape)}, expected {expected}")
        self.initial_noise, self.step_noise = initial_noise, step_noise
        self.codec = pipe.codec if decode else None  # opened before sampling, so that a missing one stops it here
        self.cancelled = cancelled or (lambda: False)
        self.preview_every = preview_every

    def _levels(self, steps: int | str | None) -> list[Level]:
        wanted = str(self.settings.steps if steps is None else steps)
        if isinstance(self.spec.process, DDPMConfig):
            try:
                return ddpm_levels(wanted)
            except ValueError as error:
                raise RequestError(f"steps: {error}") from None
        if not wanted.isdigit() or int(wanted) < 1:
            raise RequestError(f"steps: expected a positive number, got {wanted!r}")
        process = build_process(self.spec.process)
        assert isinstance(process, Flow)
        return flow_levels(process, int(wanted))

    def _channels(self) -> int:
        """Guided channels; "all" means those of the picture, never a learned variance."""
        wanted, channels = self.settings.guidance_channels, self.spec.model.in_channels
        if wanted == "all":
            return channels
        if not 1 <= wanted <= channels:
            raise RequestError(f"guidance_channels: must be 1 to {channels} or all, got {wanted}")
        return wanted

    def _check_guidance(self) -> None:
        low, high = self.settings.guidance_interval
        if not 0 <= low <= high <= 1:
            raise RequestError(f"guidance_interval: must be 0 <= lo <= hi <= 1, got {low}, {high}")
        guidance = self.settings.guidance
        if not abs(guidance) < float("inf"):
            raise RequestError(f"guidance: must be finite, got {guidance}")
        self.null = self.spec.model.null_class  # type: ignore[union-attr]
        if self.null is None and guidance != 1.0:
            raise RequestError(
                f"guidance {guidance:g}: this model has no null class (class_dropout_prob 0); use guidance 1"
            )

    def _latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        model, factor = self.spec.model, self.spec.codec.factor
        unit = model.patch_size * factor
        sides = []
        for name, side in (("height", height), ("width", width)):
            pixels = model.input_size * factor if side is None else side  # type: ignore[union-attr]
            if pixels < 1 or pixels % unit:
                raise RequestError(
                    f"{name}: {pixels} pixels are not a positive multiple of {unit} (patch size x codec factor)"
                )
            sides.append(pixels // factor)
        return (model.in_channels, sides[0], sides[1])

    def events(self) -> Iterator[Event]:
        started = time.perf_counter()
        done, evaluations, guided_rows, stop = 0, 0, 0, False
        batches = range(0, len(self.labels), self.batch_size)
        bar = tqdm(total=len(batches) * (len(self.levels) - 1), disable=None if self.progress else True, unit="step")
        with bar, torch.inference_mode():
            for first in batches:
                rows = range(first, min(first + self.batch_size, len(self.labels)))
                predict = self._guided(rows)
                x = self._initial(rows)
                for step in self._steps(predict, x, rows):
                    x = step.x
                    bar.update()
                    if self.callback:
                        self.callback(step)
                    if self.preview_every and (step.number + 1) % self.preview_every == 0:
                        yield Preview(tuple(rows), step.number + 1, len(self.levels) - 1, step.x0.cpu())
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
        denoise = build_denoiser(build_process(self.spec.process), predict)
        return self.solve(denoise, x, self.levels, lambda i: self._noise(i, rows))

    def _guided(self, rows: range) -> Guided:
        device, model = self.pipe.device, self.pipe.model
        labels = torch.tensor([self.labels[row] for row in rows], device=device)
        null = None if self.null is None else torch.full_like(labels, self.null)
        settings = self.settings
        dtype = next(model.parameters()).dtype
        return Guided(model, labels, null, settings.guidance, self.channels, settings.guidance_interval, dtype)

    def _initial(self, rows: range) -> Tensor:
        if self.initial_noise is not None:
            noise = self.initial_noise[rows.start : rows.stop].float()
        else:
            noise = torch.stack([normal(self.shape, self.seeds[row], "picture") for row in rows])
        return noise.to(self.pipe.device)

    def _noise(self, i: int, rows: range) -> Tensor:
        if self.step_noise is not None:
            noise = self.step_noise(i, (len(rows), *self.shape))
        else:
            noise = torch.stack([normal(self.shape, self.seeds[row], "step", i) for row in rows])
        return noise.to(self.pipe.device)

    def _pictures(self, rows: range, x: Tensor) -> Iterator[Picture]:
        latents = x.cpu()
        if self.codec is None:
            for row, latent in zip(rows, latents, strict=True):
                yield Picture(row, self.labels[row], self.seeds[row], latent, None, None)
            return
        decoded = self.codec.decode(x).cpu()
        images = to_pil(to_uint8(decoded))
        for row, latent, tensor, image in zip(rows, latents, decoded, images, strict=True):
            yield Picture(row, self.labels[row], self.seeds[row], latent, tensor, image)


def _merge(
    defaults: SamplingConfig,
    steps: int | str | None,
    solver_name: str | None,
    guidance: float | None,
    channels: int | Literal["all"] | None,
    interval: tuple[float, float] | None,
) -> SamplingConfig:
    return SamplingConfig(
        solver=defaults.solver if solver_name is None else solver_name,
        steps=defaults.steps if not isinstance(steps, int) else steps,
        guidance=defaults.guidance if guidance is None else float(guidance),
        guidance_channels=defaults.guidance_channels if channels is None else channels,
        guidance_interval=defaults.guidance_interval if interval is None else (float(interval[0]), float(interval[1])),
    )


def _seeds(seed: int, seeds: Sequence[int] | None, count: int) -> list[int]:
    if seeds is None:
        return [seed + k for k in range(count)]
    if len(seeds) != count:
        raise RequestError(f"seeds: {len(seeds)} seeds for {count} pictures")
    return list(seeds)


__all__ = ["Done", "Event", "Generator", "Picture", "Preview", "StepNoise"]
