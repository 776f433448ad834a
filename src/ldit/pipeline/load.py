"""`ldit.load`: opens a source as a Pipeline, which makes images."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Unpack, overload

import torch
from PIL import Image
from torch import Tensor, nn

from ldit.checkpoint.layouts.dit_pt import ProcessName, is_pt
from ldit.checkpoint.open import Source, open_source
from ldit.codecs.autoencoder import AutoencoderCodec
from ldit.codecs.conditioners import Labels
from ldit.config.experiment import Experiment
from ldit.config.model import ClassModelConfig
from ldit.config.recipes.registry import find_experiment
from ldit.config.requests.fields import from_keywords
from ldit.config.requests.sampling import INTERNAL, Machine, ModelRequest, SamplingRequest
from ldit.config.spec import ModelSpec
from ldit.diffusion.process import Process
from ldit.errors import RequestError, SourceError
from ldit.nn.build import build_model
from ldit.nn.kernels import has_triton
from ldit.parallel.world import launched
from ldit.pipeline.generate import Event, ImageSampler, Sample
from ldit.pipeline.keywords import SamplingKeywords
from ldit.pipeline.loaded import LoadedModel
from ldit.pipeline.prompts import is_text_model
from ldit.pipeline.request import check_request
from ldit.precision import DTYPES
from ldit.sampling.fast import offload as blocks
from ldit.sampling.fast.oom import out_of_memory
from ldit.sampling.fast.options import InferenceOptions, is_offloaded
from ldit.sampling.fast.prepare import check_options
from ldit.storage.tensors import assign

OutputType = Literal["pil", "tensor", "latent"]
MOST_UNCOMPILED = 2000  # images: a set from this size on takes longer than compiling does
RUNNING = ("batch_size", "progress", "callback", "cancelled", "preview_every")
"""Keywords that are options of the call itself, not of the images."""
NOISE = ("initial_noise", "step_noise")
"""Keywords that give tensors of noise, or a function that makes them."""


class Pipeline(LoadedModel):
    """A model that makes images. Calling it samples; see `sample`.

    `model` is the raw network; `spec` is the content of config.json (a dict, and its parts as attributes). Several
    requests may run at the same time, in one thread or several; a request may also move between threads. Call `to` and
    change weights only when none runs.
    """

    _guide: tuple[str, "Pipeline"] | None = None
    """Name and Pipeline of the guide that was last loaded by name."""

    def to(self, *args: Any, **kwargs: Any) -> "Pipeline":
        """Move or convert the network, as torch.nn.Module.to; an autoencoder moves with it. A guide given by name is
        loaded again when it is next used. RequestError for a model with offload, which cannot be moved."""
        if is_offloaded(self.model):
            raise RequestError("a model loaded with offload stays on its device and in its dtype; load it again")
        self.model.to(*args, **kwargs)
        self._network = self._guide = self._features = None
        if isinstance(self._codec, AutoencoderCodec):
            self._codec.to(self.device, self._codec_dtype)
        return self

    @overload
    def sample(
        self,
        class_labels: Labels = None,
        *,
        output_type: Literal["pil"] = "pil",
        **keywords: Unpack[SamplingKeywords],
    ) -> list[Image.Image]: ...

    @overload
    def sample(
        self,
        class_labels: Labels = None,
        *,
        output_type: Literal["tensor", "latent"],
        **keywords: Unpack[SamplingKeywords],
    ) -> Tensor: ...

    def sample(
        self, class_labels: Labels = None, *, output_type: OutputType = "pil", **keywords: Unpack[SamplingKeywords]
    ) -> list[Image.Image] | Tensor:
        """One image a label or prompt, or `num` images of a model without classes: a list of PIL images, a
        (B, 3, H, W) tensor in [-1, 1], or latents.

        Keywords (None: the checkpoint's default, in `spec.sampling_defaults`):
        prompts (texts, also as the first argument), negative_prompts (one, or one each): for text models.
        num: number of images of a model without classes (default 1, or as many as seeds).
        seed (images get seed, seed+1, …) or seeds (one an image).
        steps (or num_inference_steps), solver, grid, eta, diffusion, last_step, tolerance.
        guidance (or guidance_scale; 1 = off), guidance_channels (int or "all"), guidance_interval (lo, hi in noise
        time), guidance_schedule ("constant", "linear", "cosine").
        guide: a weaker model of the same kind, a Pipeline or anything that `load` takes; its output takes the place of
        the unconditional one (autoguidance). "internal": that of the model's own second head (model.mid_layer).
        height, width (pixels); for images larger than in training rope_scaling ("none", "linear", "ntk" or
        "time-aware") and proportional_attention.
        init_image: a PIL image or file to start from, or one for each image; strength: the noise time to which it is
        noised (0.6).
        batch_size, progress, callback(step), initial_noise (B, C, h, w), step_noise(i, shape).
        RequestError names what the model cannot do. Image k depends only on its label, seed, init_image and settings.
        """
        if output_type == "latent":
            return self.sample_latents(class_labels, **keywords)
        if output_type not in ("pil", "tensor"):
            raise RequestError(f"output_type: expected pil, tensor or latent, got {output_type!r}")
        samples = [event for event in self.iterate(class_labels, **keywords) if isinstance(event, Sample)]
        if output_type == "tensor":
            return _stack([sample.tensor for sample in samples if sample.tensor is not None])
        return [sample.image for sample in samples if sample.image is not None]

    __call__ = sample

    def sample_latents(self, class_labels: Labels = None, **keywords: Unpack[SamplingKeywords]) -> Tensor:
        """Latents (B, C, h, w) before decoding, fp32 on the CPU. The codec is opened only for `init_image`. Keywords as
        in `sample`."""
        events = self._sampler(class_labels, False, dict(keywords)).events()
        return _stack([event.latent for event in events if isinstance(event, Sample)])

    def iterate(
        self,
        class_labels: Labels = None,
        *,
        cancelled: Callable[[], bool] | None = None,
        preview_every: int = 0,
        **keywords: Unpack[SamplingKeywords],
    ) -> Iterator[Event]:
        """Previews (every `preview_every` steps), finished images and a final Done. It ends early when `cancelled()`
        returns true or the iterator is closed. Keywords as in `sample`."""
        return self._sampler(
            class_labels, True, {**keywords, "cancelled": cancelled, "preview_every": preview_every}
        ).events()

    def _sampler(self, class_labels: Labels, decode: bool, keywords: dict[str, Any]) -> ImageSampler:
        # Keywords are of three kinds: options of the call, tensors of noise, and the request.
        options = {name: keywords.pop(name) for name in RUNNING if name in keywords}
        noise = {name: keywords.pop(name) for name in NOISE if name in keywords}
        # What a text model is given first are prompts.
        first = "prompts" if is_text_model(self.spec) and class_labels is not None else "class_labels"
        if first in keywords:
            raise RequestError(f"{first}: given twice")
        request = from_keywords(SamplingRequest, {**keywords, first: class_labels}, "sample")
        # Check the request. The weights of a guide are read only after that.
        guide = self._opened_guide(request.guide)
        spec = None if guide is None else guide.spec
        resolved = check_request(self.spec, request, process=self.process, guide=spec, **noise)
        if isinstance(guide, Source):
            guide = self._loaded_guide(str(request.guide), guide)
        return ImageSampler(self, resolved, guide=guide, decode=decode, **options)

    def _opened_guide(self, guide: object) -> "LoadedModel | Source | None":
        """A guide that is loaded already, or its checkpoint, opened."""
        if guide is None or isinstance(guide, LoadedModel):
            return guide
        if guide == INTERNAL:
            return None
        if not isinstance(guide, (str, Path)):
            raise RequestError(f"guide: expected a Pipeline, a path or a name, got {type(guide).__name__}")
        loaded = self._guide
        return loaded[1] if loaded is not None and loaded[0] == str(guide) else open_model(guide)

    def _loaded_guide(self, name: str, source: Source) -> "Pipeline":
        """The guide loaded on this model's device. It is kept until another one is used."""
        with self._opening:
            if self._guide is None or self._guide[0] != name:
                offload = is_offloaded(self.model)
                guide = load_source(source, self.device, self.dtype, offload=offload, inference=self.inference)
                self._guide = (name, guide)
            return self._guide[1]


def _stack(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors) if tensors else torch.empty(0)  # a cancelled request may have none


def load(
    source: str | Path,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    ema: bool = True,
    *,
    codec_root: str | Path | None = None,
    heads: int | None = None,
    process: ProcessName | None = None,
    offload: bool = False,
    inference: InferenceOptions | None = InferenceOptions(),  # noqa: B008 (frozen)
    experiment: Experiment | str | None = None,
    verify: bool = True,
) -> Pipeline:
    """Open a model for sampling.

    source: a folder in the original's layout, a folder or run in ours, a DiT or SiT `.pt`, a diffusers DiTPipeline
    folder, a bundled name, or a Hub id.
    dtype: a torch dtype, "fp32", "bf16" or "fp16"; None: fp32 on the CPU, bf16 on CUDA.
    ema: use the EMA weights where there are both kinds.
    codec_root: folder in which autoencoders are looked for, beside the model's own; they are opened when first used.
    heads: number of attention heads, for DiT files of sizes that were not published.
    process: for `.pt` files that do not say whether they are DiT's (ddpm) or SiT's (flow).
    offload: keep the blocks in host memory, for models larger than the device (see `ldit.sampling.fast.offload`).
    inference: options of the copy that samples, such as int8 and compiled (see `ldit.sampling.fast.prepare`). With None
    `pipe.model` itself is called, so that hooks on its parts see every evaluation.
    experiment: what a run was trained with (or "FILE.py:FUNCTION", which is executed), for runs with a network or
    process of the user's.
    verify: compare the weights with their checksums. A large file that was compared before and has not changed since is
    not read again for it.

    SourceError names what is missing, damaged or unknown. RequestError: the model does not fit into the device's
    memory, or does not support an option.
    """
    opened = open_model(source, heads, ema, process, experiment, verify)
    return load_source(opened, device, dtype, ema, codec_root, offload, inference)


def open_model(
    source: str | Path,
    heads: int | None = None,
    ema: bool = True,
    process: ProcessName | None = None,
    experiment: Experiment | str | None = None,
    verify: bool = True,
) -> Source:
    """Recognise a source, and attach the user's objects if its training had any. SourceError when they are missing:
    the package's own network or process might accept the weights and compute something else."""
    if isinstance(experiment, str):
        experiment = find_experiment(experiment)
    found = open_source(source, heads, ema, process, verify)
    opened = replace(found, experiment=experiment, held=found)
    # The record of the training names what was not of this package.
    for part, given in (
        ("network", experiment and experiment.network),
        ("process", experiment and experiment.objective),
    ):
        own = (opened.spec.training or {}).get(part)
        if own and given is None:
            raise SourceError(
                f"{opened.path}: its {part} is not of this package ({own}); give the experiment that it was trained "
                "with: --experiment FILE.py:FUNCTION, or ldit.load(…, experiment=…)"
            )
    return opened


def own_process(source: Source) -> Process | None:
    """The process of the experiment that a source was opened with; None where it has none."""
    return source.experiment.objective if source.experiment else None


def own_network(source: Source) -> Callable[[Any], Any] | None:
    """The builder of the user's network whose weights a source has; None where they are a network's of the package."""
    is_own = "network" in (source.spec.training or {})
    return source.experiment.network if is_own and source.experiment else None


def load_source(
    source: Source,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    ema: bool = True,
    codec_root: str | Path | None = None,
    offload: bool = False,
    inference: InferenceOptions | None = InferenceOptions(),  # noqa: B008 (frozen)
) -> Pipeline:
    """`load` for a source that is open already."""
    # Choose device and dtype, and check the options for them, before weights are read.
    device = torch.device(device) if device is not None else default_device()
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    elif isinstance(dtype, str):
        if dtype not in DTYPES:
            raise RequestError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
        dtype = DTYPES[dtype]
    if inference is not None:
        _check_inference(inference, source.spec, device, dtype, offload)
    # Read the weights. If they do not fit, the error names a way out.
    try:
        if offload:  # in the files' own dtype, so that they need no memory beside the files'
            model = blocks.offload(load_model(source, "cpu", None, ema), device, dtype)
        else:
            model = load_model(source, device, dtype, ema)
    except Exception as error:
        if not out_of_memory(error):
            raise
        advice = "" if offload else "; --offload (offload=True) keeps its blocks on the host"
        raise RequestError(f"{source.path} does not fit into the memory of {device}{advice}") from None
    root = Path(codec_root) if codec_root else None
    return Pipeline(model, source.spec, source.path, root, inference=inference, process=own_process(source))


def _check_inference(
    inference: InferenceOptions, spec: ModelSpec, device: torch.device, dtype: torch.dtype, offload: bool
) -> None:
    """RequestError for options that exclude each other, or that the network or device does not support."""
    check_options(spec.model, inference, device)
    if inference.int8 and (device.type != "cpu" or dtype is not torch.float32):
        raise RequestError(f"int8: products in 8 bits are for the CPU and fp32, got {device} and {dtype}")
    for name in ("int8", "compiled", "graph", "packed", "host_modulation"):
        if offload and getattr(inference, name):
            raise RequestError(f"{name}: does not go with offload, whose blocks stay as the files have them")


def load_model(
    source: Source,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    ema: bool = True,
) -> nn.Module:
    """The network with its weights, for inference. It is built on the meta device and filled tensor by tensor: peak
    memory is its own size and one tensor."""
    network = own_network(source)
    with torch.device("meta"):
        model = network(source.spec.model) if network else build_model(source.spec.model, "meta")
    assign(model, source.tensors(ema), str(source.path), device, dtype)
    return model.eval().requires_grad_(False)


def open_requested(request: ModelRequest) -> Source:
    """Open the source of a request."""
    given = (request.heads, request.ema, request.process, request.experiment, request.verify)
    return open_model(request.source, *given)


def open_guide(request: ModelRequest) -> Source | None:
    """Open the weaker model of a request; None where it has none. `heads` and `process` are for `.pt` files, so a guide
    gets them only if it is one. A guide with objects of the user's was trained with the experiment of the request."""
    if request.guide in (None, INTERNAL):
        return None
    heads, process = (request.heads, request.process) if is_pt(request.guide) else (None, None)
    return open_model(request.guide, heads, request.ema, process, request.experiment, request.verify)


def inference_options(machine: Machine) -> InferenceOptions:
    """The options of the inference copy for a request."""
    if machine.eager and (machine.graphs or machine.compile):
        raise RequestError("eager: is the opposite of graphs and compile")
    graph = True if machine.graphs else False if machine.eager else None
    return InferenceOptions(
        int8=machine.int8, compiled=machine.compile, graph=graph, host_modulation=machine.host_modulation
    )


def is_compiled(machine: Machine, sources: Iterable[Source | None], device: torch.device, num: int) -> bool:
    """Whether the networks are compiled for a set of `num` images: when asked, or where it pays off by itself."""
    given = [source for source in sources if source is not None]
    fits = all(isinstance(one.spec.model, ClassModelConfig) and own_network(one) is None for one in given)
    fits = fits and not (machine.int8 or machine.offload or machine.eager)
    return machine.compile or (fits and num >= MOST_UNCOMPILED and has_triton(device))


def checked_device(name: str) -> torch.device:
    """The device of this name; RequestError when there is none, or when it cannot hold values (meta)."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise RequestError(f"device {name!r}: {str(error).splitlines()[0]}") from None
    return device


def process_device(name: str | None) -> torch.device:
    """The device of one of several processes. For "cuda", and None where there are GPUs, each process takes its own
    GPU; else the device of this name, by default the CPU."""
    if name in (None, "cuda") and torch.cuda.is_available():
        return torch.device("cuda", launched().local_rank % torch.cuda.device_count())
    return checked_device(name or "cpu")


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
