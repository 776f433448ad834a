"""Pictures to files: the labelled grid, single PNGs with their settings inside, latents."""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ldit.checkpoint.open import open_source
from ldit.checkpoint.tensors import write_safetensors
from ldit.codecs.open import open_codec
from ldit.codecs.pixels import labelled_grid, published_grid
from ldit.config.labels import resolve_label
from ldit.config.spec import ModelSpec
from ldit.errors import RequestError
from ldit.flows.generate import Done, Generator, Picture
from ldit.flows.pipeline import Pipeline, load_source

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LATENT_SUFFIXES = (".safetensors", ".npy", ".pt")
DEFAULT_CLASSES = (207, 360, 387, 974, 88, 979, 417, 279)  # the original's eight
FEW_CLASSES = 16


@dataclass(frozen=True)
class Request:
    """What to sample from where; `options` are arguments of `Pipeline.sample`."""

    source: str
    labels: tuple[str, ...] = ()
    per_class: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    ema: bool = True
    device: str | None = None
    dtype: str | None = None
    codec_root: Path | None = None
    heads: int | None = None
    published: bool = False
    """The original's unlabelled grid instead of ours."""


def make_pictures(request: Request, grid: Path, singles: Path | None, latents: Path | None) -> Iterator[str]:
    """Sample and write; yields a line for each thing done. Faults are raised before sampling starts."""
    target = latents or grid
    if not target.absolute().parent.is_dir():
        raise RequestError(f"no folder {target.absolute().parent} to write {target.name} into")
    if latents and latents.suffix not in LATENT_SUFFIXES:
        raise RequestError(f"{latents}: latents are written as {', '.join(LATENT_SUFFIXES)}")
    if not latents and grid.suffix.lower() != ".png":
        raise RequestError(f"{grid}: pictures are written as .png")
    if request.per_class < 1:
        raise RequestError(f"per_class: must be at least 1, got {request.per_class}")
    opened = open_source(request.source, request.heads, request.ema)
    if latents is None:
        open_codec(opened.spec.codec, request.codec_root)  # before gigabytes of weights are read
    dtype = DTYPES.get(request.dtype or "")
    pipe = load_source(opened, _device(request.device), dtype, request.ema, request.codec_root)
    labels = [label for label in _labels(request.labels, pipe.spec) for _ in range(request.per_class)]
    generator = Generator(pipe, labels, decode=latents is None, progress=True, **request.options)
    pictures: list[Picture] = []
    for event in generator.events():
        if isinstance(event, Picture):
            pictures.append(event)
        elif isinstance(event, Done):
            yield (
                f"{event.pictures} pictures, {event.evaluations} evaluations, {event.guided_rows} guided rows, "
                f"{event.seconds:.1f} s"
            )
    if latents:
        _write_latents(latents, torch.stack([picture.latent for picture in pictures]))
        yield str(latents)
        return
    settings = _settings(request, generator)
    if singles:
        singles.mkdir(parents=True, exist_ok=True)
        for picture in pictures:
            path = singles / f"{picture.index:05d}_{_slug(_name(pipe, picture.label))}_seed{picture.seed}.png"
            assert picture.image is not None
            picture.image.save(path, pnginfo=_chunk({**settings, "label": picture.label, "seed": picture.seed}))
        yield f"{len(pictures)} PNGs in {singles}"
    _grid(pipe, pictures, request.published).save(grid, pnginfo=_chunk(settings))
    yield str(grid)


def _labels(wanted: tuple[str, ...], spec: ModelSpec) -> list[int]:
    count = getattr(spec.model, "num_classes", 0)
    if wanted:
        return [resolve_label(label, count, spec.class_names) for label in wanted]
    if count > FEW_CLASSES:
        return [label for label in DEFAULT_CLASSES if label < count]
    return list(range(count))


def _device(name: str | None) -> torch.device | None:
    if name is None:
        return None
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RequestError(f"device {name!r}: {str(error).splitlines()[0]}") from None
    return device


def _grid(pipe: Pipeline, pictures: list[Picture], published: bool) -> Any:
    if published:
        return published_grid(torch.stack([p.tensor for p in pictures if p.tensor is not None]))
    images = [p.image for p in pictures if p.image is not None]
    scale = max(1, 128 // images[0].width)
    return labelled_grid(images, [_name(pipe, p.label) for p in pictures], scale=scale)


def _name(pipe: Pipeline, label: int) -> str:
    names = pipe.spec.class_names
    return names[label] if names else f"class {label}"


def _slug(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text).strip("-")[:60]


def _settings(request: Request, generator: Generator) -> dict[str, Any]:
    return {
        "source": request.source,
        "labels": generator.labels,
        "seeds": generator.seeds,
        "sampling": {**asdict(generator.settings), "steps": request.options.get("steps", generator.settings.steps)},
        "ema": request.ema,
        "training": generator.spec.training,
    }


def _chunk(settings: dict[str, Any]) -> PngInfo:
    info = PngInfo()
    info.add_text("ldit", json.dumps(settings))
    return info


def _write_latents(path: Path, latents: Tensor) -> None:
    if path.suffix == ".npy":
        np.save(path, latents.numpy())
    elif path.suffix == ".pt":
        torch.save(latents, path)
    else:
        write_safetensors(path, [("latents", latents)])
