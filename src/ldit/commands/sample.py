"""`ldit sample`: writes a labelled grid, single PNGs with their settings inside, latents, or a set of images."""

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ldit.checkpoint.run import trained_on
from ldit.codecs.codec import check_codec
from ldit.codecs.conditioners import (
    ClassConditioner,
    Conditioner,
    TextConditioner,
    build_conditioner,
    check_conditioner,
)
from ldit.codecs.pixels import labelled_grid, published_grid
from ldit.config.assets import imagenet_names
from ldit.config.requests.sampling import SampleRequest, SamplingRequest
from ldit.config.spec import ModelSpec
from ldit.errors import RequestError
from ldit.log import logger, setup
from ldit.pipeline.generate import Done, ImageSampler, Sample
from ldit.pipeline.load import (
    checked_device,
    inference_options,
    load_source,
    open_guide,
    open_requested,
    own_process,
)
from ldit.pipeline.loaded import codec_roots
from ldit.pipeline.prompts import negative_prompts, request_prompts
from ldit.pipeline.request import ResolvedRequest, check_request
from ldit.pipeline.sets.make import make_set
from ldit.storage.manifest import check_not_in_checkpoint
from ldit.storage.outputs import check_target, put, refuse_inside, whole
from ldit.storage.signals import Stopped
from ldit.storage.tensors import write_safetensors

LATENT_SUFFIXES = (".safetensors", ".npy", ".pt")
DEFAULT_CLASSES = (207, 360, 387, 974, 88, 979, 417, 279)  # the original's eight of ImageNet
FEW_CLASSES = 16


def run(request: SampleRequest) -> int:
    """`ldit sample`: a labelled grid, or with --num and --out a set."""
    if request.num is not None and request.out is not None:
        return _run_set(request, request.num, request.out)
    if request.labels is not None:
        raise RequestError(f"labels {request.labels}: is for sets, which --num with --out makes")
    setup()
    for line in make_images(request):
        print(line)
    return 0


def _run_set(request: SampleRequest, num: int, out: Path) -> int:
    """Make a set of `num` images in `out`; returns the exit code."""
    # Refuse flags that have no meaning for a set.
    if request.latents_out is not None:
        raise RequestError("latents_out: a set holds images; leave out --latents-out, or --num")
    if request.per_class != 1:
        raise RequestError(f"per_class {request.per_class}: a set is shared out evenly; num is all its images")
    given = (("init_image", request.init_image), ("from_image", request.from_image), ("base", request.base))
    for name, value in (*given, ("seeds", request.seeds)):
        if value:
            raise RequestError(
                f"{name}: sets are made from noise of --seed alone; leave out --num or --{name.replace('_', '-')}"
            )
    # Make it, or this process's share of it. A signal leaves the finished images.
    setup()
    try:
        is_complete = make_set(request, num, out)
    except Stopped as stop:
        print(f"ldit: {stop}: what is finished of {out} is kept, rerun the same command to finish it", file=sys.stderr)
        return stop.code
    if is_complete:
        print(out)
    return 0


def make_images(request: SampleRequest, published: bool = False) -> Iterator[str]:
    """Sample and write files; yields a line of text after each step. Errors of the request or of the files to write are
    raised before weights are read. `published`: an unlabelled grid and three guided channels, as the original has."""
    _check_targets(request)
    # Check the request against the spec, without weights.
    opened = open_requested(request)
    _check_outside(request, opened.path)
    weaker = open_guide(request)
    # Of a cascade the small images first; the first stage's weights are freed before those of the second are read.
    if request.base is not None:
        yield f"first stage: {request.base}"
        request = replace(request, from_image=_small(request))
    resolved = check_request(
        opened.spec,
        _sampling(request, opened.spec, published),
        process=own_process(opened),
        guide=None if weaker is None else weaker.spec,
    )
    root, conditioner = request.local_diffusers_model_root, resolved.conditioner
    roots = codec_roots(root, opened.path)
    check_conditioner(opened.spec, roots)
    if request.latents_out is None or resolved.init is not None:
        check_codec(opened.spec.codec, roots, opened.spec.model.in_channels)
    # Read the weights.
    device, inference = None if request.device is None else checked_device(request.device), inference_options(request)
    pipe = load_source(opened, device, request.dtype, request.ema, root, request.offload, inference)
    guide = None
    if weaker is not None:
        guide = load_source(weaker, pipe.device, pipe.dtype, request.ema, None, request.offload, inference)
    # Sample.
    count, steps, used = len(resolved.labels), len(resolved.levels) - 1, resolved.settings
    what = "1 image" if count == 1 else f"{count} images"
    length = f"tolerance {used.tolerance:g} of" if resolved.one_by_one else f"{steps} steps of"
    logger.info("sampling %s: %s %s, guidance %g", what, length, used.solver, used.guidance)
    decode = request.latents_out is None
    sampler = ImageSampler(pipe, resolved, guide=guide, decode=decode, batch_size=request.batch_size, progress=True)
    samples: list[Sample] = []
    for event in sampler.events():
        if isinstance(event, Sample):
            samples.append(event)
        elif isinstance(event, Done):
            yield (
                f"{event.images} images, {event.evaluations} evaluations, {event.guided_rows} guided rows, "
                f"{event.seconds:.1f} s"
            )
    # Write latents, or single images and the grid.
    if request.latents_out is not None:
        _write_latents(request.latents_out, torch.stack([sample.latent for sample in samples]))
        yield str(request.latents_out)
        return
    settings = _settings(request, resolved, pipe.spec)
    if request.out is not None:
        _write_singles(request.out, samples, conditioner, settings)
        yield f"{len(samples)} PNGs in {request.out}"
    _save(_grid(conditioner, samples, published), request.image_save_path, settings)
    yield str(request.image_save_path)


def _small(request: SampleRequest) -> list[Image.Image]:
    """The images of the first stage of a cascade, from the same labels or prompts and seeds."""
    if request.from_image is not None:
        raise RequestError("base: give images to enlarge, or a model that makes them, not both")
    own = replace(request, source=str(request.base), base=None, guide=None, height=None, width=None, init_image=None)
    opened = open_requested(own)
    resolved = check_request(opened.spec, _sampling(own, opened.spec, False), process=own_process(opened))
    device, inference = None if own.device is None else checked_device(own.device), inference_options(own)
    root = own.local_diffusers_model_root
    pipe = load_source(opened, device, own.dtype, own.ema, root, own.offload, inference)
    events = ImageSampler(pipe, resolved, batch_size=own.batch_size, progress=True).events()
    return [event.image for event in events if isinstance(event, Sample) and event.image is not None]


def _check_targets(request: SampleRequest) -> None:
    """RequestError when a file or folder of the request cannot be written."""
    grid, singles, latents = request.image_save_path, request.out, request.latents_out
    check_target(latents or grid)
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
    if request.per_class < 1:
        raise RequestError(f"per_class: must be at least 1, got {request.per_class}")


def _check_outside(request: SampleRequest, source: Path) -> None:
    """RequestError when an image would be written among those that the model was trained on."""
    data = trained_on(source)
    if data is not None:
        for target in (request.latents_out or request.image_save_path, request.out):
            if target is not None:
                refuse_inside(target, [data])


def _sampling(request: SampleRequest, spec: ModelSpec, published: bool) -> SamplingRequest:
    """The request for the sampler, with a label for each image. Start images are one for all, or one per label: these
    are repeated for all images of the label."""
    prompts = request_prompts(spec, request)
    changes: dict[str, Any]
    if prompts is not None:
        changes = {"prompts": [prompt for prompt in prompts for _ in range(request.per_class)], "prompts_file": None}
        negatives = negative_prompts(request, len(prompts))
        if len(negatives) > 1:
            changes["negative_prompts"] = [prompt for prompt in negatives for _ in range(request.per_class)]
    else:
        conditioner = build_conditioner(spec)
        assert isinstance(conditioner, ClassConditioner)
        changes = {"class_labels": _labels(request, spec, conditioner)}
    if request.init_image is not None and len(request.init_image) > 1:
        changes["init_image"] = [image for image in request.init_image for _ in range(request.per_class)]
    if request.from_image is not None and request.base is None and len(request.from_image) > 1:
        changes["from_image"] = [image for image in request.from_image for _ in range(request.per_class)]
    if published:
        changes["guidance_channels"] = min(3, spec.model.in_channels)
    return request.sampling(**changes)


def _labels(request: SampleRequest, spec: ModelSpec, conditioner: ClassConditioner) -> list[int | str]:
    """A label for each image: those of the request, each `per_class` times. By default all classes, of many the first
    sixteen, of ImageNet the eight of the original."""
    if not conditioner.is_unconditional and request.num is not None:
        raise RequestError(
            f"num {request.num}: this model has classes; --out DIR or FILE.npz makes a set of so many images, "
            "--per-class so many of each label"
        )
    if request.per_class > 1 and conditioner.is_unconditional:
        raise RequestError(f"per_class {request.per_class}: this model has no classes; num is the number of images")
    labels: list[int | str] = list(conditioner.resolve(request.class_labels)) if request.class_labels else []
    if not labels:
        imagenet = conditioner.count == len(imagenet_names()) and spec.class_names in (None, imagenet_names())
        labels = list(DEFAULT_CLASSES if imagenet else range(min(conditioner.count, FEW_CLASSES)))
    return [label for label in labels for _ in range(request.per_class)]


def _write_singles(folder: Path, samples: list[Sample], conditioner: Conditioner, settings: dict[str, Any]) -> None:
    """Write a PNG for each image, named by number, class and seed."""
    folder.mkdir(parents=True, exist_ok=True)
    for sample in samples:
        name = _slug(conditioner.name_of(sample.label))
        path = folder / "_".join(filter(None, (f"{sample.index:05d}", name, f"seed{sample.seed}.png")))
        assert sample.image is not None
        _save(sample.image, path, {**settings, "label": sample.label, "seed": sample.seed})


def _grid(conditioner: Conditioner, samples: list[Sample], published: bool) -> Image.Image:
    if published:
        return published_grid(torch.stack([sample.tensor for sample in samples if sample.tensor is not None]))
    images = [sample.image for sample in samples if sample.image is not None]
    scale = max(1, 128 // images[0].width)
    return labelled_grid(images, [conditioner.name_of(sample.label) for sample in samples], scale=scale)


def _slug(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text).strip("-")[:60]


def _settings(request: SampleRequest, resolved: ResolvedRequest, spec: ModelSpec) -> dict[str, Any]:
    """The settings that the images depend on, which are stored in PNGs."""
    settings = {
        "source": request.source,
        "labels": resolved.labels,
        **_texts(resolved, request),
        "seeds": resolved.seeds,
        "sampling": {**asdict(resolved.settings), "steps": resolved.steps},
        "ema": request.ema,
        "training": spec.training,
    }
    if request.guide is not None:
        settings["guide"] = request.guide
    if resolved.init is not None:
        settings |= {"init_image": [Path(file).name for file in request.init_image], "strength": resolved.strength}
    return settings


def _texts(resolved: ResolvedRequest, request: SampleRequest) -> dict[str, Any]:
    """The prompts by number, and the negative one where there is one."""
    if not isinstance(resolved.conditioner, TextConditioner):
        return {}
    negative = {} if request.negative_prompts is None else {"negative_prompts": request.negative_prompts}
    return {"prompts": list(resolved.conditioner.texts), **negative}


def _save(image: Image.Image, path: Path, settings: dict[str, Any]) -> None:
    """Write an image; a PNG stores `settings` in its text chunk "ldit"."""
    info = PngInfo()
    info.add_text("ldit", json.dumps(settings))
    data = BytesIO()
    kind = Image.registered_extensions()[path.suffix.lower()]
    image.save(data, kind, **({"pnginfo": info} if kind == "PNG" else {}))
    put(path, data.getvalue())


def _write_latents(path: Path, latents: Tensor) -> None:
    with whole(path, latents.numel() * latents.element_size()) as temporary:
        if path.suffix == ".npy":
            with temporary.open("wb") as file:
                np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(latents.numpy()))
                file.write(latents.contiguous().numpy().data.cast("B"))  # np.save hides why it could not write
        elif path.suffix == ".pt":
            torch.save(latents, temporary)
        else:
            write_safetensors(temporary, [("latents", latents)])
