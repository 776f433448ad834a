"""Types of the keywords of `Pipeline`: the fields of `SamplingRequest`, and what only Python can pass."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypedDict

from torch import Tensor

from ldit.pipeline.init_image import InitImage
from ldit.pipeline.loaded import LoadedModel
from ldit.pipeline.request import StepNoise
from ldit.sampling.step import Step


class RequestKeywords(TypedDict, total=False):
    """The fields of `ldit.config.requests.sampling.SamplingRequest`, where each is described, and their aliases. None
    stands for the checkpoint's default."""

    num: int | None
    seed: int
    seeds: Iterable[int] | None
    prompts: str | Sequence[str] | None
    prompts_file: Path | None
    negative_prompts: str | Sequence[str] | None
    negative_prompt: str | Sequence[str] | None
    steps: int | str | None
    num_inference_steps: int | str | None
    num_sampling_steps: int | str | None
    solver: str | None
    grid: str | Sequence[float] | None
    eta: float | None
    diffusion: str | None
    last_step: str | None
    tolerance: float | None
    guidance: float | None
    guidance_scale: float | None
    cfg_scale: float | None
    guidance_channels: int | str | None
    guidance_interval: tuple[float, float] | None
    guidance_schedule: str | None
    guide: LoadedModel | str | Path | None
    height: int | None
    width: int | None
    rope_scaling: str | None
    proportional_attention: bool | None
    init_image: InitImage
    from_image: InitImage
    strength: float | None


class SamplingKeywords(RequestKeywords, total=False):
    """All keywords of a call: the request, tensors of noise, and options of the call itself."""

    initial_noise: Tensor | None
    step_noise: StepNoise | None
    batch_size: int
    progress: bool
    callback: Callable[[Step], None] | None
