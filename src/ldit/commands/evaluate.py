"""`ldit evaluate`, `ldit stats` and `ldit.evaluate`: metrics of images against a reference."""

from functools import partial
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

from ldit.config.experiment import Experiment
from ldit.config.requests.evaluate import EvaluateRequest, StatsRequest
from ldit.config.requests.fields import from_keywords
from ldit.config.requests.sampling import Rule
from ldit.eval.evaluate import evaluate as measure
from ldit.eval.evaluate import save_statistics
from ldit.log import setup


class EvaluateKeywords(TypedDict, total=False):
    """The fields of `ldit.config.requests.evaluate.EvaluateRequest`, where each is described, and their aliases."""

    others: tuple[str, ...]
    num: int | None
    image_size: int | None
    extractor: str
    inception_weights: Path | None
    fetch: bool
    protocol: str | None
    metrics: tuple[str, ...]
    components: int
    bootstrap: int
    json: Path | None
    figure: Path | None
    matcher: str | None
    class_labels: tuple[int | str, ...]
    labels: Rule | None
    seed: int
    prompts: str | tuple[str, ...] | None
    prompts_file: Path | None
    negative_prompts: str | tuple[str, ...] | None
    negative_prompt: str | tuple[str, ...] | None
    steps: int | str | None
    num_inference_steps: int | str | None
    num_sampling_steps: int | str | None
    solver: str | None
    grid: str | None
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
    guide: str | None
    height: int | None
    width: int | None
    rope_scaling: str | None
    proportional_attention: bool | None
    ema: bool
    heads: int | None
    experiment: Experiment | str | None
    process: Literal["ddpm", "flow"] | None
    verify: bool
    local_diffusers_model_root: Path | None
    codec_root: Path | None
    batch_size: int
    device: str | None
    dtype: Literal["fp32", "bf16", "fp16"] | None
    offload: bool
    int8: bool
    compile: bool
    graphs: bool
    host_modulation: bool
    eager: bool


def evaluate(source: str | Path, reference: str | Path, **keywords: Unpack[EvaluateKeywords]) -> dict[str, Any]:
    """`ldit.evaluate`: FID and Fréchet distances in other features, Inception Score, precision, recall and KID of
    samples of a checkpoint, or of existing images, against a reference. Returns the dict that `ldit evaluate --json`
    writes. Errors as in `ldit.eval.evaluate.evaluate`."""
    given = {**keywords, "source": str(source), "reference": str(reference)}
    return measure(from_keywords(EvaluateRequest, given, "evaluate"), lambda table: None)


def run(request: EvaluateRequest) -> int:
    """`ldit evaluate`."""
    setup()
    measure(request, partial(print, flush=True))  # flush, so that output that fails is noticed at once
    return 0


def run_stats(request: StatsRequest) -> int:
    """`ldit stats`."""
    setup()
    count, (height, width) = save_statistics(request)
    print(f"{count:,} images of {height} x {width}: {request.out}")
    return 0
