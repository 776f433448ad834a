"""Checks a sampling request against a spec, before weights are read, and fills in the defaults."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image
from torch import Tensor

from ldit.codecs.conditioners import ClassConditioner, Conditioner, build_conditioner
from ldit.config.model import TextModelConfig
from ldit.config.requests.sampling import INTERNAL, SamplingRequest
from ldit.config.serial import to_dict
from ldit.config.spec import ModelSpec, SamplingConfig
from ldit.diffusion.build import build_process
from ldit.diffusion.process import Level, Process
from ldit.errors import RequestError
from ldit.pipeline.cascade import small_images
from ldit.pipeline.guide import check_guide
from ldit.pipeline.numbers import NO_NUMBER, as_float, as_int
from ldit.pipeline.prompts import negative_prompts, request_prompts
from ldit.sampling.grids import build_grid, is_listed
from ldit.sampling.guidance import check_schedule
from ldit.sampling.resolution import check_scaling
from ldit.sampling.sde import parse_last_step
from ldit.sampling.solvers import ADAPTIVE, OWN_SETTINGS, REVISIONS, find_solver
from ldit.sampling.step import Solver

StepNoise = Callable[[int, tuple[int, ...]], Tensor]
"""(i, shape) -> the noise of solver step i, counted from 0 (the noisiest), of shape (B, C, h, w)."""
SETTINGS = (
    "solver", "eta", "diffusion", "last_step", "tolerance", "guidance_channels", "guidance_interval",
    "guidance_schedule", "rope_scaling", "proportional_attention",
)  # fmt: skip
"""Fields of a request that replace those of the spec's sampling section unchanged."""
STRENGTH = 0.6
"""Default noise time to which a start image is noised: SDEdit's compromise between keeping the image and correcting
it."""
MOST_PIXELS = 1 << 16
"""Largest side of an image: far more than fits into memory."""


@dataclass(frozen=True)
class ResolvedRequest:
    """A checked request with every default filled in: a label and a seed for each image, latents of `shape` (C, h, w).
    `internal`: whether the model's own second head guides.

    `init` are the start images, one for all or one each, cropped to the requested size; then `levels` begin at
    `strength`. `small` are the images that the second stage of a cascade enlarges, one for all or one each.
    `negatives`: a negative prompt for each image, where they are not the same."""

    labels: tuple[int, ...]
    seeds: tuple[int, ...]
    shape: tuple[int, int, int]
    settings: SamplingConfig
    steps: str
    process: Process
    solve: Solver
    levels: tuple[Level, ...]
    channels: int
    conditioner: Conditioner
    initial_noise: Tensor | None
    step_noise: StepNoise | None
    internal: bool = False
    init: tuple[Image.Image, ...] | None = None
    strength: float | None = None
    small: tuple[Image.Image, ...] | None = None
    negatives: tuple[str, ...] = ()

    @property
    def one_by_one(self) -> bool:
        """Whether every image is a batch of its own: its steps would depend on its company."""
        return self.settings.solver == ADAPTIVE

    def sampling(self) -> dict[str, Any]:
        """The settings on which the images depend, as they are recorded beside images and figures."""
        settings = {**to_dict(self.settings), "steps": self.steps}
        # Settings that younger versions added are recorded where they have an effect: older records lack them.
        for name in ("diffusion", "last_step", "tolerance"):
            if OWN_SETTINGS[name][0] != self.settings.solver:
                del settings[name]
        if self.settings.solver in REVISIONS:
            settings["solver_revision"] = REVISIONS[self.settings.solver]
        return settings


def check_request(
    spec: ModelSpec,
    request: SamplingRequest,
    *,
    process: Process | None = None,
    guide: ModelSpec | None = None,
    initial_noise: Tensor | None = None,
    step_noise: StepNoise | None = None,
) -> ResolvedRequest:
    """The request with every default filled in; RequestError names what this model cannot do.

    A model with classes makes one image a label. A model without classes takes no labels: it makes `num` images, by
    default one for each of `seeds` or of `init_image`, else one. Without a `guide` nothing can be guided: its guidance
    is 1 whatever the spec says, and a request for another is an error. `process` is used instead of the spec's. `guide`
    is the spec of the weaker model for autoguidance.
    """
    # A label, or a prompt by its number, a seed and a start image for each image.
    prompts = request_prompts(spec, request)
    texts = () if prompts is None else tuple(dict.fromkeys(prompts))
    negatives = () if prompts is None else negative_prompts(request, len(prompts))
    conditioner = build_conditioner(spec, texts, negatives[0] if negatives else None)
    images, seeds = _given_images(request.init_image), _listed_seeds(request.seeds)
    places = {text: place for place, text in enumerate(texts)}
    numbers = None if prompts is None else tuple(places[prompt] for prompt in prompts)
    labels = _labels(request, seeds, images, conditioner, numbers)
    # Everything that the spec's sampling section has a default for.
    steps = _steps(spec.sampling_defaults.steps if request.steps is None else request.steps)
    internal = request.guide == INTERNAL
    if internal and not spec.model.mid_layer:
        raise RequestError(f"guide {INTERNAL}: the model has no second head (model.mid_layer)")
    has_guide = internal or guide is not None
    guidance = _guidance(spec, request.guidance, conditioner.is_unconditional and not has_guide)
    settings = _settings(spec, request, steps, guidance)
    process = process or build_process(spec.process)
    # The latents: their shape, and whether they start from noise or from images at a strength.
    shape = _latent_shape(spec, request.height, request.width)
    _check_guidance(conditioner, settings, has_guide)
    if guide is not None:
        if isinstance(guide.model, TextModelConfig) or prompts is not None:
            raise RequestError("guide: is for class models, or internal (model.mid_layer)")
        trained = _latent_shape(spec, None, None), _latent_shape(guide, None, None)
        check_guide(spec, guide, shape, trained)
    _check_noise(initial_noise, (len(labels), *shape), step_noise)
    strength = _strength(request.strength, images)
    return ResolvedRequest(
        labels=labels,
        seeds=_seeds(request.seed, seeds, len(labels)),
        shape=shape,
        settings=settings,
        steps=steps,
        process=process,
        solve=find_solver(
            settings.solver,
            settings.eta,
            diffusion=settings.diffusion,
            last_step=settings.last_step,
            tolerance=settings.tolerance,
            process=process,
        ),
        levels=_levels(process, steps, request.steps is not None, settings, strength),
        channels=_channels(spec, settings),
        conditioner=conditioner,
        initial_noise=initial_noise,
        step_noise=step_noise,
        internal=internal,
        init=_init(spec, images, shape, len(labels)),
        strength=strength,
        negatives=negatives if len(negatives) > 1 else (),
        small=small_images(spec, request.from_image, shape, len(labels)),
    )


def _settings(spec: ModelSpec, request: SamplingRequest, steps: str, guidance: float) -> SamplingConfig:
    """The spec's sampling section, with the values that the request sets."""
    # Values of the request replace those of the section, whose settings of solvers are meant for its own solver.
    values = {name: getattr(request, name) for name in SETTINGS} | {"grid": _grid(request.grid)}
    given = {name: value for name, value in values.items() if value is not None}
    if "solver" in given and given["solver"] != spec.sampling_defaults.solver:
        for name, (_, default) in OWN_SETTINGS.items():
            given.setdefault(name, default)
    if "grid" in given and is_listed(given["grid"]):  # it has its own last step: only the kind of the default applies
        given.setdefault("last_step", parse_last_step(spec.sampling_defaults.last_step)[0])
    if steps.isdecimal():
        given["steps"] = int(steps)
    settings = replace(spec.sampling_defaults, **given, guidance=guidance)
    # Check types: values may come from Python.
    for name in ("solver", "guidance_schedule", "rope_scaling", "diffusion", "last_step"):
        if not isinstance(getattr(settings, name), str):
            raise RequestError(f"{name}: expected a name, got {getattr(settings, name)!r:.80}")
    try:
        low, high = map(float, settings.guidance_interval)
    except NO_NUMBER:
        got = repr(settings.guidance_interval)
        raise RequestError(f"guidance_interval: expected two numbers, got {got:.80}") from None
    check_schedule(settings.guidance_schedule)
    check_scaling(spec.model, settings.rope_scaling, settings.proportional_attention)
    eta, tolerance = as_float("eta", settings.eta), as_float("tolerance", settings.tolerance)
    return replace(settings, guidance_interval=(low, high), eta=eta, tolerance=tolerance)


def _labels(
    request: SamplingRequest,
    seeds: Sequence[int] | None,
    images: Sequence[Any] | None,
    conditioner: Conditioner,
    prompts: tuple[int, ...] | None,
) -> tuple[int, ...]:
    """A class index for each image, or the number of its prompt; a model without classes makes `num` images of label
    0."""
    if prompts is not None and request.num is not None:
        raise RequestError(f"num {request.num}: this model makes one image a prompt")
    if prompts is not None:
        return prompts
    assert isinstance(conditioner, ClassConditioner)
    labels = conditioner.resolve(request.class_labels)
    if not labels and conditioner.is_unconditional:
        return (0,) * _number(request.num, len(seeds if seeds is not None else images or (0,)))
    if request.num is not None:
        raise RequestError(f"num {request.num}: this model has classes and makes one image a label")
    if not labels:
        raise RequestError("name at least one class label")
    return labels


def _number(num: int | None, default: int) -> int:
    """The number of images of a model without classes."""
    number = default if num is None else as_int("num", num)
    if number < 1:
        raise RequestError(f"num: must be at least 1, got {number}")
    return number


def _guidance(spec: ModelSpec, scale: float | None, nothing_to_guide: bool) -> float:
    """The guidance scale."""
    if scale is None:
        return 1.0 if nothing_to_guide else spec.sampling_defaults.guidance
    number = as_float("guidance", scale)
    if nothing_to_guide and number != 1:
        raise RequestError(f"guidance {number:g}: this model has no classes, so there is nothing to guide; use 1")
    return number


def _channels(spec: ModelSpec, settings: SamplingConfig) -> int:
    """Number of guided channels; "all" are those of the latent, never those of a learned variance."""
    guided, channels = settings.guidance_channels, spec.model.in_channels
    if guided == "all":
        return channels
    if not isinstance(guided, int) or not 1 <= guided <= channels:
        raise RequestError(f"guidance_channels: must be 1 to {channels} or all, got {guided}")
    return guided


def _check_guidance(conditioner: Conditioner, settings: SamplingConfig, has_guide: bool) -> None:
    low, high = settings.guidance_interval
    if not 0 <= low <= high <= 1:
        raise RequestError(f"guidance_interval: must be 0 <= lo <= hi <= 1, got {low}, {high}")
    if not abs(settings.guidance) < float("inf"):
        raise RequestError(f"guidance: must be finite, got {settings.guidance}")
    if conditioner.null is None and settings.guidance != 1.0 and not has_guide:
        raise RequestError(
            f"guidance {settings.guidance:g}: this model has no null class or text (class_dropout_prob or text.dropout "
            "0); use guidance 1"
        )


def _latent_shape(spec: ModelSpec, height: int | None, width: int | None) -> tuple[int, int, int]:
    """(C, h, w) of the latents; height and width are in pixels, None = as in training."""
    model, factor = spec.model, spec.codec.factor
    trained = model.input_size  # the side of the latents of training
    unit = model.side_unit * factor
    sides = []
    for name, side in (("height", height), ("width", width)):
        pixels = trained * factor if side is None else as_int(name, side)
        if pixels < 1 or pixels % unit:
            raise RequestError(
                f"{name}: {pixels} pixels are not a positive multiple of {unit} (side of a patch x codec factor)"
            )
        if pixels > MOST_PIXELS:
            raise RequestError(f"{name}: must be at most {MOST_PIXELS} pixels, got {pixels}")
        sides.append(pixels // factor)
    return (model.in_channels, sides[0], sides[1])


def _listed_seeds(seeds: Iterable[int] | None) -> tuple[int, ...] | None:
    if seeds is None:
        return None
    try:
        listed = list(seeds)
    except TypeError:
        raise RequestError(f"seeds: expected one whole number an image, got {seeds!r:.80}") from None
    return tuple(as_int("seeds", seed) for seed in listed)


def _seeds(seed: int, seeds: tuple[int, ...] | None, count: int) -> tuple[int, ...]:
    if seeds is None:
        first = as_int("seed", seed)
        return tuple(first + k for k in range(count))
    if len(seeds) != count:
        raise RequestError(f"seeds: {len(seeds)} seeds for {count} images")
    return seeds


def _check_noise(initial: Any, expected: tuple[int, ...], step: Any) -> None:
    if initial is not None and not isinstance(initial, Tensor):
        raise RequestError(f"initial_noise: expected a tensor of shape {expected}, got a {type(initial).__name__}")
    if initial is not None and tuple(initial.shape) != expected:
        raise RequestError(f"initial_noise: shape {tuple(initial.shape)}, expected {expected}")
    if step is not None and not callable(step):
        raise RequestError(f"step_noise: expected a function of step and shape, got a {type(step).__name__}")


def _strength(strength: float | None, images: Sequence[Any] | None) -> float | None:
    """The noise time of the start images; None where there are none."""
    number = STRENGTH if strength is None else as_float("strength", strength)
    if images is None:
        if strength is not None:
            raise RequestError(f"strength {number:g}: there is no init_image to start from")
        return None
    if not 0 < number <= 1:
        raise RequestError(f"strength: must be above 0 and at most 1, got {number:g}")
    return number


def _steps(steps: int | str) -> str:
    return steps if isinstance(steps, str) else str(as_int("steps", steps))


def _grid(grid: Any) -> str | None:
    """The grid as a string: a name, or a list or array of noise times written as "1,0.5"."""
    if grid is None or isinstance(grid, str):
        return grid
    times = grid.tolist() if hasattr(grid, "tolist") else grid
    if not isinstance(times, (list, tuple)) or not times:
        raise RequestError(f"grid: expected a name or a list of noise times, got {grid!r:.80}")
    return ",".join(repr(as_float("grid", time)).removesuffix(".0") for time in times)


def _levels(
    process: Process, steps: str, named: bool, settings: SamplingConfig, strength: float | None
) -> tuple[Level, ...]:
    """The levels of the grid; with a strength only those that are not noisier."""
    grid = settings.grid
    levels = build_grid(process, steps, grid, parse_last_step(settings.last_step)[1])
    if named and is_listed(grid) and steps != str(len(levels) - 1):
        raise RequestError(f"steps {steps}: grid {grid!r} has {len(levels) - 1}; give another grid, such as uniform")
    if strength is None:
        return levels
    kept = tuple(level for level in levels if level.noise_time <= strength + 1e-9)  # 1 - 7/10 is a little above 0.3
    if len(kept) < 2:
        count, least = len(levels) - 1, levels[-2].noise_time
        raise RequestError(f"strength {strength:g}: the last of the {count} steps starts at {least:g}; take more steps")
    return kept


def _init(
    spec: ModelSpec, images: list[Image.Image] | None, shape: tuple[int, int, int], count: int
) -> tuple[Image.Image, ...] | None:
    """The start images, cropped to the requested size."""
    if images is None:
        return None
    if len(images) not in (1, count):
        raise RequestError(f"init_image: {len(images)} images to start from for {count}; give one, or one each")
    factor = spec.codec.factor
    from ldit.pipeline.init_image import cut

    return cut(images, shape[2] * factor, shape[1] * factor)


def _given_images(given: Any) -> list[Image.Image] | None:
    """The start images, opened; None for a request that starts from noise."""
    if given is None:  # as nearly always: decoding is then not imported
        return None
    from ldit.pipeline.init_image import given_images

    return given_images(given)
