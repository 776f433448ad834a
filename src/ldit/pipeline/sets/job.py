"""What a set of images is: how many, of which labels, from which weights, sampled how. It says nothing of machines,
so that any of them makes the same set, or finds that it would make another."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ldit.checkpoint.fingerprint import weights_fingerprint
from ldit.checkpoint.open import Source
from ldit.codecs.kl_config import read_kl_config
from ldit.codecs.kl_weights import fingerprint
from ldit.codecs.open import codec_folder
from ldit.commands.sample import ImageJob
from ldit.config.labels import resolve_label
from ldit.config.serial import to_dict
from ldit.config.spec import AutoencoderConfig, ModelSpec
from ldit.diffusion.build import build_process
from ldit.errors import RequestError
from ldit.pipeline.load import codec_roots
from ldit.pipeline.request import Request
from ldit.rng import uniform
from ldit.sampling.denoiser import build_denoiser
from ldit.sampling.guidance import Guided
from ldit.storage.shared_job import brief

FORMAT = 1
Rule = Literal["balanced", "random"]
ENDING = ("complete", "labels")  # what is known in the end


@dataclass(frozen=True)
class SetJob:
    """What `ldit sample --num N --out …` is asked for: `images` says of what model and how, and image k of `num`
    has its seed + k. Blocks of `images.batch_size` images are sampled together."""

    images: ImageJob
    num: int
    rule: Rule | None = None
    """How labels are dealt; None: balanced, or none where the model has no classes."""

    def __post_init__(self) -> None:
        for name, value in (("num", self.num), ("batch_size", self.images.batch_size)):
            if value < 1:
                raise RequestError(f"{name}: must be at least 1, got {value}")
        if self.images.per_class != 1:
            raise RequestError(f"per_class {self.images.per_class}: a set is dealt evenly; num is all its images")
        if self.images.options.get("init_image"):
            raise RequestError("init_image: sets are made from noise alone; leave out --num or --init-image")

    @property
    def seed(self) -> int:
        return int(self.images.options.get("seed", 0))

    def options(self) -> dict[str, Any]:
        """Arguments of `check_request` that are the same for every block."""
        own = ("num", "seed", "init_image", "strength")
        return {name: value for name, value in self.images.options.items() if name not in own}


@dataclass(frozen=True)
class Labels:
    """The labels of a set's images, each a function of its number; 0 where the model has no classes.

    balanced: image k has `choices[k mod their number]`, so that every stretch of a set has all classes; random:
    uniform over `choices`, drawn for each k from (seed, "label", k).
    """

    rule: Rule | None
    choices: tuple[int, ...]
    seed: int

    def of(self, rows: range) -> tuple[int, ...]:
        """Of these images."""
        count = len(self.choices)
        if self.rule == "random":
            return tuple(self.choices[int(uniform(self.seed, "label", id=k) * count)] for k in rows)
        return tuple(self.choices[k % count] for k in rows)


def assign_labels(job: SetJob, spec: ModelSpec) -> Labels:
    """The labels of a set; RequestError for a class that the model does not have, and for a rule without classes."""
    count = getattr(spec.model, "num_classes", 0)
    if not count:
        if job.images.labels or job.rule is not None:
            asked = f"labels {job.rule}" if job.rule is not None else f"class {job.images.labels[0]!r}"
            raise RequestError(f"{asked}: this model has no classes")
        return Labels(None, (0,), job.seed)
    named = tuple(resolve_label(label, count, spec.class_names) for label in job.images.labels)
    return Labels(job.rule or "balanced", named or tuple(range(count)), job.seed)


def describe(
    job: SetJob, source: Source, guide: Source | None, request: Request, labels: Labels, dtype: str
) -> dict[str, Any]:
    """The content of samples.json when a set is begun: all that its images depend on. Weights and autoencoder are in
    it by their fingerprints, so it takes as long as reading them where no manifest knows their checksums."""
    spec, factor = source.spec, source.spec.codec.factor
    evaluations, guided = cost(request, spec, guide is not None)
    everyone = labels.choices == tuple(range(getattr(spec.model, "num_classes", 0)))
    description = {
        "format": FORMAT,
        "num": job.num,
        "size": [side * factor for side in request.shape[1:]],
        "batch_size": job.images.batch_size,
        "seed": job.seed,
        "label_rule": labels.rule,
        "class_names": None if spec.class_names is None else list(spec.class_names),
        "classes": None if everyone or labels.rule is None else list(labels.choices),
        "sampling": {**to_dict(request.settings), "steps": request.steps},
        "evaluations": evaluations,
        "guided_evaluations": guided,
        "dtype": dtype,
        "int8": job.images.int8,
        "compiled": job.images.compiled,
        "ema": job.images.ema,
        "source": _name(job.images.source),
        "weights": weights_fingerprint(source, job.images.ema),
        "training": to_dict(spec.training),
        "network": to_dict(spec.model),
        "process": to_dict(spec.process),
        "codec": _codec(job.images, source),
        "guide": None,
        "complete": False,
    }
    if guide is not None:
        assert job.images.guide is not None
        weights = weights_fingerprint(guide, job.images.ema)
        description["guide"] = {"source": _name(job.images.guide), "weights": weights}
    return description


def ended(description: dict[str, Any], labels: Labels) -> dict[str, Any]:
    """The content of samples.json when every image is there."""
    final = {**description, "complete": True}
    return final if labels.rule is None else {**final, "labels": list(labels.of(range(description["num"])))}


def check_format(out: Path, begun: Any) -> None:
    """RequestError for a description that another version wrote."""
    version = begun.get("format") if isinstance(begun, dict) else begun
    if not isinstance(begun, dict) or version != FORMAT:
        raise RequestError(f"--out {out}: its description is of format {brief(version)}, expected {FORMAT}")


def cost(request: Request, spec: ModelSpec, weak: bool) -> tuple[int, int]:
    """Evaluations that an image takes, and how many of them are guided: the solver runs on a single value of nothing,
    and asks of no network."""
    channels = spec.model.out_channels

    def nothing(x: Tensor, time: Tensor, cond: Any) -> Tensor:
        return torch.zeros(len(x), channels, *x.shape[2:])

    label = torch.zeros(1, dtype=torch.int64)
    settings, null = request.settings, None if request.null is None else torch.full_like(label, request.null)
    predict = Guided(
        nothing,
        label,
        null,
        settings.guidance,
        request.channels,
        settings.guidance_interval,
        schedule=settings.guidance_schedule,
        weak=nothing if weak else None,
    )
    zero = torch.zeros(1, request.shape[0], 1, 1)
    for _ in request.solve(build_denoiser(build_process(spec.process), predict), zero, request.levels, lambda i: zero):
        pass
    return predict.evaluations, predict.guided_rows


def _codec(job: ImageJob, source: Source) -> dict[str, Any]:
    """The codec by what it computes, not by where it lies."""
    config = source.spec.codec
    described = {key: value for key, value in to_dict(config).items() if key != "name"}
    if isinstance(config, AutoencoderConfig):
        folder = codec_folder(config.name, codec_roots(job.codec_root, source.path))
        described["weights"] = fingerprint(folder, read_kl_config(folder))
    return described


def _name(source: str) -> str:
    """The last part of a path or a name: where it lies is the machine's."""
    return Path(source).name or source
