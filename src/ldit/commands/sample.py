"""Images to files: the labelled grid, single PNGs with their settings inside, latents."""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ldit.checkpoint.layouts.dit_pt import ProcessName, is_pt
from ldit.checkpoint.open import Source, open_source
from ldit.codecs.open import check_codec
from ldit.codecs.pixels import labelled_grid, published_grid
from ldit.config.assets import imagenet_names
from ldit.config.spec import ModelSpec
from ldit.errors import RequestError
from ldit.pipeline.generate import Done, Generator, Sample
from ldit.pipeline.load import Pipeline, checked_device, codec_roots, load_source
from ldit.pipeline.request import Request, check_request
from ldit.sampling.fast.prepare import InferenceOptions
from ldit.storage.manifest import check_not_in_checkpoint
from ldit.storage.outputs import check_target
from ldit.storage.tensors import write_safetensors

LATENT_SUFFIXES = (".safetensors", ".npy", ".pt")
DEFAULT_CLASSES = (207, 360, 387, 974, 88, 979, 417, 279)  # the original's eight of ImageNet
FEW_CLASSES = 16


@dataclass(frozen=True)
class ImageJob:
    """What to sample from where; `options` are arguments of `check_request`."""

    source: str
    labels: tuple[str, ...] = ()
    per_class: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 16
    ema: bool = True
    device: str | None = None
    dtype: str | None = None
    codec_root: Path | None = None
    heads: int | None = None
    process: ProcessName | None = None
    guide: str | None = None
    """A weaker model that guides."""
    offload: bool = False
    """Leave the blocks on the host, the guide's too."""
    int8: bool = False
    """Products of blocks in 8 bits, on a CPU; likewise."""
    compiled: bool = False
    """Compile the blocks; likewise."""
    graphs: bool = False
    """An evaluation as one CUDA graph, on a GPU; likewise."""
    host_modulation: bool = False
    """Keep the adaLN weights on the host; likewise."""
    published: bool = False
    """The original's unlabelled grid and its three guided channels."""

    @property
    def inference(self) -> InferenceOptions:
        """What the copy that samples is like."""
        return InferenceOptions(
            int8=self.int8, compiled=self.compiled, graph=self.graphs, host_modulation=self.host_modulation
        )


def make_images(job: ImageJob, grid: Path, singles: Path | None, latents: Path | None) -> Iterator[str]:
    """Sample and write; yields a line for each thing done. Every fault of the request or of the files to write is
    raised before weights are read."""
    _check_targets(job, grid, singles, latents)
    opened = open_source(job.source, job.heads, job.ema, job.process)
    weaker = open_guide(job)
    guide = None if weaker is None else weaker.spec
    request = check_request(opened.spec, _labels(job, opened.spec), guide=guide, **_options(job, opened.spec))
    if latents is None or request.init is not None:
        roots = codec_roots(job.codec_root, opened.path)
        check_codec(opened.spec.codec, roots, opened.spec.model.in_channels)
    device = None if job.device is None else checked_device(job.device)
    pipe = load_source(opened, device, job.dtype, job.ema, job.codec_root, job.offload, job.inference)
    loaded = None
    if weaker is not None:
        loaded = load_source(weaker, pipe.device, pipe.dtype, job.ema, None, job.offload, job.inference)
    decode = latents is None
    generator = Generator(pipe, request, guide=loaded, decode=decode, batch_size=job.batch_size, progress=True)
    pictures: list[Sample] = []
    for event in generator.events():
        if isinstance(event, Sample):
            pictures.append(event)
        elif isinstance(event, Done):
            yield (
                f"{event.images} images, {event.evaluations} evaluations, {event.guided_rows} guided rows, "
                f"{event.seconds:.1f} s"
            )
    if latents:
        _write_latents(latents, torch.stack([picture.latent for picture in pictures]))
        yield str(latents)
        return
    settings = _settings(job, request, pipe.spec)
    if singles:
        singles.mkdir(parents=True, exist_ok=True)
        for picture in pictures:
            parts = (f"{picture.index:05d}", _slug(_name(pipe, picture.label)), f"seed{picture.seed}.png")
            path = singles / "_".join(filter(None, parts))
            assert picture.image is not None
            _save(picture.image, path, {**settings, "label": picture.label, "seed": picture.seed})
        yield f"{len(pictures)} PNGs in {singles}"
    _save(_grid(pipe, pictures, job.published), grid, settings)
    yield str(grid)


def _check_targets(job: ImageJob, grid: Path, singles: Path | None, latents: Path | None) -> None:
    target = latents or grid
    check_target(target)
    if singles is not None:
        check_not_in_checkpoint(singles)
    if latents and latents.suffix not in LATENT_SUFFIXES:
        raise RequestError(f"{latents}: latents are written as {', '.join(LATENT_SUFFIXES)}")
    if not latents and grid.suffix.lower() not in Image.registered_extensions():
        raise RequestError(f"{grid}: unknown kind of image; use .png")
    if singles and singles.suffix == ".npz":
        raise RequestError(f"{singles}: an .npz is a set of images; say how many with --num")
    if singles and singles.exists() and not singles.is_dir():
        raise RequestError(f"{singles} is a file, expected a folder")
    if job.per_class < 1:
        raise RequestError(f"per_class: must be at least 1, got {job.per_class}")


def _labels(job: ImageJob, spec: ModelSpec) -> list[int | str]:
    """The labels asked for; else every class of a small set, the original's eight of ImageNet, or the first sixteen."""
    count = getattr(spec.model, "num_classes", 0)
    if count and "num" in job.options:
        raise RequestError(
            f"num {job.options['num']}: this model has classes; --out DIR or FILE.npz makes a set of so many images, "
            "--per-class so many of each label"
        )
    if job.per_class > 1 and count == 0 and spec.model.kind == "class":
        raise RequestError(f"per_class {job.per_class}: this model has no classes; num is the number of images")
    chosen: list[int | str] = list(job.labels)
    if not chosen:
        imagenet = count == len(imagenet_names()) and spec.class_names in (None, imagenet_names())
        chosen = list(DEFAULT_CLASSES if imagenet else range(min(count, FEW_CLASSES)))
    return [label for label in chosen for _ in range(job.per_class)]


def open_guide(job: ImageJob) -> Source | None:
    """`process` is for files that do not tell theirs, so for a guide only where it is such a file."""
    if job.guide is None:
        return None
    heads, process = (job.heads, job.process) if is_pt(job.guide) else (None, None)
    return open_source(job.guide, heads, job.ema, process)


def _options(job: ImageJob, spec: ModelSpec) -> dict[str, Any]:
    """Images to start from are one for all or one a label, whose images all start from it."""
    options = dict(job.options)
    pictures = options.get("init_image", ())
    if len(pictures) > 1:
        options["init_image"] = [picture for picture in pictures for _ in range(job.per_class)]
    if job.published:
        options["guidance_channels"] = min(3, spec.model.in_channels)
    return options


def _grid(pipe: Pipeline, pictures: list[Sample], published: bool) -> Image.Image:
    if published:
        return published_grid(torch.stack([p.tensor for p in pictures if p.tensor is not None]))
    images = [p.image for p in pictures if p.image is not None]
    scale = max(1, 128 // images[0].width)
    return labelled_grid(images, [_name(pipe, p.label) for p in pictures], scale=scale)


def _name(pipe: Pipeline, label: int) -> str:
    """The caption of a class; none for a model without classes."""
    if getattr(pipe.spec.model, "num_classes", None) == 0:
        return ""
    names = pipe.spec.class_names
    return names[label] if names else f"class {label}"


def _slug(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text).strip("-")[:60]


def _settings(job: ImageJob, request: Request, spec: ModelSpec) -> dict[str, Any]:
    return {
        "source": job.source,
        "labels": request.labels,
        "seeds": request.seeds,
        "sampling": {**asdict(request.settings), "steps": request.steps},
        "ema": job.ema,
        "training": spec.training,
        **({} if job.guide is None else {"guide": job.guide}),
        **({} if request.init is None else {"init_image": _file_names(job), "strength": request.strength}),
    }


def _file_names(job: ImageJob) -> list[str]:
    return [Path(file).name for file in job.options["init_image"]]


def _save(picture: Image.Image, path: Path, settings: dict[str, Any]) -> None:
    """PNGs carry their settings in the text chunk "ldit"; the file appears whole."""
    info = PngInfo()
    info.add_text("ldit", json.dumps(settings))
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        if path.suffix.lower() == ".png":
            picture.save(temporary, pnginfo=info)
        else:
            picture.save(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_latents(path: Path, latents: Tensor) -> None:
    if path.suffix == ".npy":
        np.save(path, latents.numpy())
    elif path.suffix == ".pt":
        torch.save(latents, path)
    else:
        write_safetensors(path, [("latents", latents)])
