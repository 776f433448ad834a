"""`ldit.load`: a source to an object that makes images."""

from collections.abc import Callable, Iterator
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
from ldit.config.recipes.registry import find_experiment
from ldit.config.requests.fields import from_keywords
from ldit.config.requests.sampling import Machine, ModelRequest, SamplingRequest
from ldit.config.spec import ModelSpec
from ldit.diffusion.process import Process
from ldit.errors import RequestError, SourceError
from ldit.nn.build import build_model
from ldit.parallel.world import launched
from ldit.pipeline.generate import Event, Generator, Sample
from ldit.pipeline.keywords import SamplingKeywords
from ldit.pipeline.loaded import LoadedModel
from ldit.pipeline.request import check_request
from ldit.precision import DTYPES
from ldit.sampling.fast import offload as blocks
from ldit.sampling.fast.oom import out_of_memory
from ldit.sampling.fast.options import InferenceOptions, is_offloaded
from ldit.sampling.fast.prepare import check_options
from ldit.storage.tensors import assign

OutputType = Literal["pil", "tensor", "latent"]
RUNNING = ("batch_size", "progress", "callback", "cancelled", "preview_every")
"""Keywords that say how a call runs."""
NOISE = ("initial_noise", "step_noise")
"""Keywords that are tensors of noise, or make them."""


class Pipeline(LoadedModel):
    """A model that makes images. Calling it samples; see `sample`.

    `model` is the raw network; `spec` is the content of config.json (a dict, and its parts as attributes). Requests may
    run side by side, in one thread or in several, also one request in several threads by turns; `to` and new weights
    wait until none runs.
    """

    _guide: tuple[str, "Pipeline"] | None = None
    """The guide that was last loaded by name."""

    def to(self, *args: Any, **kwargs: Any) -> "Pipeline":
        """Move or convert the network, as torch.nn.Module.to; an autoencoder moves with it. A guide given by name is
        loaded anew when it is next needed. RequestError where the blocks are on the host: load the model again."""
        if is_offloaded(self.model):
            raise RequestError("a model loaded with offload stays on its device and in its dtype; load it again")
        self.model.to(*args, **kwargs)
        self._network = self._guide = None
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
        """One image a label, or `num` images of a model without classes: a list of PIL images, a (B, 3, H, W) tensor in
        [-1, 1], or latents.

        Keywords (None: the checkpoint's default, in `spec.sampling_defaults`):
        num (default 1, or as many as seeds); steps (or num_inference_steps), solver, grid, eta; guidance (or
        guidance_scale; 1 = off), guidance_channels (int or "all"), guidance_interval (lo, hi in noise time),
        guidance_schedule ("constant", "linear", "cosine"), guide (a weaker model of the same kind, a Pipeline or
        anything `load` takes, whose output takes the place of the null class's); seed (images get seed, seed+1, …) or
        seeds; height, width (pixels), and for images larger than those of training rope_scaling ("none", "linear",
        "ntk" or "time-aware") and proportional_attention; init_image (a PIL image or file, or one each) with strength
        (the noise time it is brought to, 0.6); batch_size, progress, callback(step), initial_noise (B, C, h, w),
        step_noise(i, shape).
        RequestError names what cannot be served. Image k depends on its seed and init_image alone.
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
        """Latents (B, C, h, w) before decoding, fp32 on the CPU; no codec is opened but for `init_image`. Keywords as
        in `sample`."""
        events = self._generator(class_labels, False, dict(keywords)).events()
        return _stack([event.latent for event in events if isinstance(event, Sample)])

    def iterate(
        self,
        class_labels: Labels = None,
        *,
        cancelled: Callable[[], bool] | None = None,
        preview_every: int = 0,
        **keywords: Unpack[SamplingKeywords],
    ) -> Iterator[Event]:
        """Previews, finished images and a final Done; stops early when `cancelled()` turns true or the iterator is
        closed. Keywords as in `sample`."""
        return self._generator(
            class_labels, True, {**keywords, "cancelled": cancelled, "preview_every": preview_every}
        ).events()

    def _generator(self, class_labels: Labels, decode: bool, keywords: dict[str, Any]) -> Generator:
        # Keywords are of three kinds: how the call runs, tensors of noise, and the request.
        running = {name: keywords.pop(name) for name in RUNNING if name in keywords}
        noise = {name: keywords.pop(name) for name in NOISE if name in keywords}
        request = from_keywords(SamplingRequest, {**keywords, "class_labels": class_labels}, "sample")
        guide = self._opened_guide(request.guide)
        spec = None if guide is None else guide.spec
        resolved = check_request(self.spec, request, process=self.process, guide=spec, **noise)
        if isinstance(guide, Source):  # its weights are read once the request is known to be sound
            guide = self._loaded_guide(str(request.guide), guide)
        return Generator(self, resolved, guide=guide, decode=decode, **running)

    def _opened_guide(self, guide: object) -> "LoadedModel | Source | None":
        """A guide that is loaded already, or its checkpoint."""
        if guide is None or isinstance(guide, LoadedModel):
            return guide
        if not isinstance(guide, (str, Path)):
            raise RequestError(f"guide: expected a Pipeline, a path or a name, got {type(guide).__name__}")
        known = self._guide
        return known[1] if known is not None and known[0] == str(guide) else open_model(guide)

    def _loaded_guide(self, name: str, source: Source) -> "Pipeline":
        """The weights of a guide on this model's device, which are kept until another is named."""
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
) -> Pipeline:
    """Open a model: a folder in the original's layout, a folder or run in ours, a DiT or SiT `.pt`, a diffusers
    DiTPipeline folder, a bundled name, or a Hub id. dtype (a torch dtype, "fp32", "bf16" or "fp16"): None is fp32 on
    the CPU, bf16 on CUDA. `ema` takes the EMA weights where kept apart. Neither codec nor text encoder is opened; local
    autoencoders will be looked for in `codec_root` and in the model's own folder. `heads` is for DiT files of unlisted
    sizes, `process` for those that do not tell whether they are DiT's (ddpm) or SiT's (flow).
    `offload` leaves the blocks on the host, for models larger than the device (see `ldit.sampling.fast.offload`).
    `inference` says what the copy that samples is like, int8 and compiled among them (see
    `ldit.sampling.fast.prepare`); with None `pipe.model` itself is called, so that hooks on its parts see every
    evaluation. `experiment` is what a run was trained with (or "FILE.py:FUNCTION", which is run), for runs whose
    network or process is the user's own.

    SourceError names what is missing, damaged or unknown; RequestError says that the device has no room for the model,
    or that a switch does not go with it.
    """
    opened = open_model(source, heads, ema, process, experiment)
    return load_source(opened, device, dtype, ema, codec_root, offload, inference)


def open_model(
    source: str | Path,
    heads: int | None = None,
    ema: bool = True,
    process: ProcessName | None = None,
    experiment: Experiment | str | None = None,
) -> Source:
    """A source of images: recognised, and with the user's own objects where its training had any. SourceError where
    they are missing: a step holds numbers, and the package's own network or process may accept them and be wrong."""
    if isinstance(experiment, str):
        experiment = find_experiment(experiment)
    opened = replace(open_source(source, heads, ema, process), experiment=experiment)
    for what, given in (
        ("network", experiment and experiment.network),
        ("process", experiment and experiment.objective),
    ):
        own = (opened.spec.training or {}).get(what)
        if own and given is None:
            raise SourceError(
                f"{opened.path}: its {what} is not of this package ({own}); give the experiment that it was trained "
                "with: --experiment FILE.py:FUNCTION, or ldit.load(…, experiment=…)"
            )
    return opened


def own_process(source: Source) -> Process | None:
    """The user's process that a source was trained with; None where its configuration describes it."""
    is_own = "process" in (source.spec.training or {})
    return source.experiment.objective if is_own and source.experiment else None


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
    # Settle device and dtype, and check what they allow, before weights are read.
    device = torch.device(device) if device is not None else default_device()
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    elif isinstance(dtype, str):
        if dtype not in DTYPES:
            raise RequestError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
        dtype = DTYPES[dtype]
    if inference is not None:
        _check_inference(inference, source.spec, device, dtype, offload)
    # Read the weights; what does not fit is an error that names a way out.
    try:
        if offload:  # as the files have them, so that they need no memory of their own
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
    """RequestError for what cannot be had; before weights are read."""
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
    """The network with its weights, for inference: built on the meta device, filled tensor by tensor, so that the peak
    of memory is the final size and one tensor."""
    network = source.experiment.network if source.experiment else None
    with torch.device("meta"):
        model = network(source.spec.model) if network else build_model(source.spec.model, "meta")
    assign(model, source.tensors(ema), str(source.path), device, dtype)
    return model.eval().requires_grad_(False)


def open_requested(request: ModelRequest) -> Source:
    """The source that a request names."""
    return open_model(request.source, request.heads, request.ema, request.process, request.experiment)


def open_guide(request: ModelRequest) -> Source | None:
    """The weaker model of a request. `heads` and `process` are for files that do not name theirs, so they are given to
    a guide only where it is such a file."""
    if request.guide is None:
        return None
    heads, process = (request.heads, request.process) if is_pt(request.guide) else (None, None)
    return open_model(request.guide, heads, request.ema, process)


def inference_options(machine: Machine) -> InferenceOptions:
    """What the inference copy of a request is like."""
    return InferenceOptions(
        int8=machine.int8, compiled=machine.compile, graph=machine.graphs, host_modulation=machine.host_modulation
    )


def checked_device(name: str) -> torch.device:
    """The device of a flag; RequestError when it is none, is not there, or holds no numbers."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise RequestError(f"device {name!r}: {str(error).splitlines()[0]}") from None
    return device


def process_device(name: str | None) -> torch.device:
    """That of a flag, or a GPU where there are any, for one process of several: of GPUs without a number its own."""
    if name in (None, "cuda") and torch.cuda.is_available():
        return torch.device("cuda", launched().local_rank % torch.cuda.device_count())
    return checked_device(name or "cpu")


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
