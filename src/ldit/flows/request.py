"""A sampling request, checked against a spec alone: before weights are read, and before a run trains towards it."""

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ldit.config.labels import resolve_label
from ldit.config.spec import ModelSpec, SamplingConfig
from ldit.diffusion.build import build_process
from ldit.errors import RequestError
from ldit.sampling.grids import build_grid
from ldit.sampling.levels import Level
from ldit.sampling.solvers import find_solver
from ldit.sampling.step import Solver

StepNoise = Callable[[int, tuple[int, ...]], Tensor]
Labels = int | str | Iterable[int | str] | Tensor | None


@dataclass(frozen=True)
class Request:
    """What to sample: one label and one seed a picture, latents of `shape` (C, h, w), and how."""

    labels: tuple[int, ...]
    seeds: tuple[int, ...]
    shape: tuple[int, int, int]
    settings: SamplingConfig
    steps: str
    solve: Solver
    levels: tuple[Level, ...]
    channels: int
    null: int | None
    initial_noise: Tensor | None
    step_noise: StepNoise | None


def check_request(
    spec: ModelSpec,
    class_labels: Labels = None,
    *,
    num: int | None = None,
    prompts: Sequence[str] | None = None,
    steps: int | str | None = None,
    solver: str | None = None,
    grid: str | None = None,
    eta: float | None = None,
    guidance: float | None = None,
    guidance_channels: int | Literal["all"] | None = None,
    guidance_interval: tuple[float, float] | None = None,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    height: int | None = None,
    width: int | None = None,
    initial_noise: Tensor | None = None,
    step_noise: StepNoise | None = None,
) -> Request:
    """The request with every default filled in, or RequestError naming what this model cannot serve.

    A model with classes makes one picture a label. A model without classes takes no labels: it makes `num` pictures,
    by default one for each of `seeds`, else one. It has nothing to guide, so its guidance is 1 whatever the spec's
    sampling section says, and asking for another is an error.
    """
    if prompts is not None or spec.model.kind == "text":
        raise RequestError("text-to-image sampling is not built yet")
    if getattr(spec.model, "cond_channels", 0):
        raise RequestError("model.cond_channels: sampling with extra input channels is not built yet")
    labels = _labels(class_labels, num, seeds, spec)
    defaults = spec.sampling_defaults
    low, high = defaults.guidance_interval if guidance_interval is None else guidance_interval
    wanted = str(defaults.steps if steps is None else steps)
    settings = SamplingConfig(
        solver=defaults.solver if solver is None else solver,
        steps=int(wanted) if wanted.isdecimal() else defaults.steps,
        guidance=_guidance(spec, guidance),
        guidance_channels=defaults.guidance_channels if guidance_channels is None else guidance_channels,
        guidance_interval=(float(low), float(high)),
        grid=defaults.grid if grid is None else grid,
        eta=defaults.eta if eta is None else float(eta),
    )
    shape = _latent_shape(spec, height, width)
    expected = (len(labels), *shape)
    if initial_noise is not None and tuple(initial_noise.shape) != expected:
        raise RequestError(f"initial_noise: shape {tuple(initial_noise.shape)}, expected {expected}")
    return Request(
        labels=labels,
        seeds=_seeds(seed, seeds, len(labels)),
        shape=shape,
        settings=settings,
        steps=wanted,
        solve=find_solver(settings.solver, settings.eta),
        levels=build_grid(build_process(spec.process), wanted, settings.grid),
        channels=_channels(spec, settings),
        null=_null(spec, settings),
        initial_noise=initial_noise,
        step_noise=step_noise,
    )


def _labels(wanted: Labels, num: int | None, seeds: Sequence[int] | None, spec: ModelSpec) -> tuple[int, ...]:
    """One index a picture; a lone name or number is a list of one, arrays are lists."""
    if isinstance(wanted, (str, int)):
        wanted = [wanted]
    listed: list[Any] = wanted.tolist() if hasattr(wanted, "tolist") else list(wanted or ())  # type: ignore[union-attr]
    if not isinstance(listed, list):
        listed = [listed]
    count = spec.model.num_classes  # type: ignore[union-attr]
    if not listed and count == 0:
        return (0,) * _number(num, 1 if seeds is None else len(seeds))
    labels = tuple(resolve_label(label, count, spec.class_names) for label in listed)
    if num is not None:
        raise RequestError(f"num {num}: this model has classes and makes one picture a label; sets are not built yet")
    if not labels:
        raise RequestError("name at least one class label")
    return labels


def _number(num: int | None, default: int) -> int:
    try:
        found = default if num is None else operator.index(num)
    except TypeError:
        raise RequestError(f"num: expected a number of pictures, got {num!r}") from None
    if found < 1:
        raise RequestError(f"num: must be at least 1, got {found}")
    return found


def _guidance(spec: ModelSpec, wanted: float | None) -> float:
    unconditional = getattr(spec.model, "num_classes", None) == 0
    if wanted is None:
        return 1.0 if unconditional else spec.sampling_defaults.guidance
    if unconditional and wanted != 1:
        raise RequestError(f"guidance {wanted:g}: this model has no classes, so there is nothing to guide; use 1")
    return float(wanted)


def _channels(spec: ModelSpec, settings: SamplingConfig) -> int:
    """Guided channels; "all" means those of the picture, never a learned variance."""
    wanted, channels = settings.guidance_channels, spec.model.in_channels
    if wanted == "all":
        return channels
    if not isinstance(wanted, int) or not 1 <= wanted <= channels:
        raise RequestError(f"guidance_channels: must be 1 to {channels} or all, got {wanted}")
    return wanted


def _null(spec: ModelSpec, settings: SamplingConfig) -> int | None:
    low, high = settings.guidance_interval
    if not 0 <= low <= high <= 1:
        raise RequestError(f"guidance_interval: must be 0 <= lo <= hi <= 1, got {low}, {high}")
    if not abs(settings.guidance) < float("inf"):
        raise RequestError(f"guidance: must be finite, got {settings.guidance}")
    null: int | None = spec.model.null_class  # type: ignore[union-attr]
    if null is None and settings.guidance != 1.0:
        raise RequestError(
            f"guidance {settings.guidance:g}: this model has no null class (class_dropout_prob 0); use guidance 1"
        )
    return null


def _latent_shape(spec: ModelSpec, height: int | None, width: int | None) -> tuple[int, int, int]:
    model, factor = spec.model, spec.codec.factor
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


def _seeds(seed: int, seeds: Sequence[int] | None, count: int) -> tuple[int, ...]:
    if seeds is None:
        return tuple(seed + k for k in range(count))
    if len(seeds) != count:
        raise RequestError(f"seeds: {len(seeds)} seeds for {count} pictures")
    return tuple(int(s) for s in seeds)
