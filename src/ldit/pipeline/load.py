"""`ldit.load`: a source to an object that makes images."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ldit.checkpoint.layouts.dit_pt import ProcessName
from ldit.checkpoint.open import Source, open_source
from ldit.codecs.autoencoder import AutoencoderCodec
from ldit.codecs.open import Codec, open_codec
from ldit.config.spec import ModelSpec
from ldit.errors import RequestError
from ldit.nn.build import build_model
from ldit.parallel.world import launched
from ldit.pipeline.generate import Event, Generator, Sample
from ldit.pipeline.request import Labels, check_request
from ldit.precision import DTYPES
from ldit.sampling.fast import offload as blocks
from ldit.sampling.fast.oom import out_of_memory
from ldit.sampling.fast.prepare import InferenceOptions, Prepared, check_options, prepare
from ldit.storage.tensors import assign

OutputType = Literal["pil", "tensor", "latent"]
RUNNING = ("batch_size", "progress", "callback", "cancelled", "preview_every")  # arguments of the run, not the request


class Pipeline:
    """Weights and all they need to become images.

    `model` is the raw network; `spec` is the content of config.json (a dict, and its parts as attributes). Calling the
    pipeline samples; see `sample`. Requests may run side by side, in one thread or in several, also one request in
    several threads by turns; `to` and new weights wait until none runs.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: ModelSpec,
        source: Path | None = None,
        codec_root: Path | None = None,
        dtype: torch.dtype | None = None,
        codec: Codec | None = None,
        inference: InferenceOptions | None = None,
    ) -> None:
        """`inference`: sample with an inference copy of the network; None: with the network itself."""
        self.model, self.spec, self.source, self.codec_root = model, spec, source, codec_root
        self.inference = inference
        self._network: Any = None
        self._dtype = dtype
        self._codec = codec
        self._guides: dict[str, Pipeline] = {}  # by source, once used
        self._opening = threading.RLock()  # what is made at first use is made once, whoever asks

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the network takes: its parameters' dtype, or the one given where those are cast as they are used."""
        return self._dtype or next(self.model.parameters()).dtype

    @property
    def network(self) -> Any:
        """What sampling calls: the inference copy, made when first needed and again once the weights have moved, or the
        network itself where there are no `inference` or its blocks are on the host."""
        if self.inference is None or blocks.is_offloaded(self.model):
            return self.model
        with self._opening:
            if self._network is None or (isinstance(self._network, Prepared) and not self._network.current()):
                self._network = prepare(self.model, self.inference)
            return self._network

    def to(self, *args: Any, **kwargs: Any) -> "Pipeline":
        """Move or convert the network, as torch.nn.Module.to; an autoencoder moves with it. A guide given by name is
        loaded anew when it is next needed. RequestError where the blocks are on the host: load the model again."""
        if blocks.is_offloaded(self.model):
            raise RequestError("a model loaded with offload stays on its device and in its dtype; load it again")
        self.model.to(*args, **kwargs)
        self._network = None
        self._guides.clear()
        if isinstance(self._codec, AutoencoderCodec):
            self._codec.to(self.device, self._codec_dtype)
        return self

    @property
    def codec(self) -> Codec:
        """Opened at first use on the network's device; CodecError when it is not at hand."""
        with self._opening:
            if self._codec is None:
                roots, channels = codec_roots(self.codec_root, self.source), self.spec.model.in_channels
                self._codec = open_codec(self.spec.codec, roots, self.device, self._codec_dtype, channels)
            return self._codec

    @property
    def _codec_dtype(self) -> torch.dtype:
        """fp32 on the CPU and where the network is in fp16, which autoencoders may overflow; else the network's."""
        return torch.float32 if self.device.type == "cpu" or self.dtype is torch.float16 else self.dtype

    def __call__(self, class_labels: Labels = None, **arguments: Any) -> Any:
        return self.sample(class_labels, **arguments)

    def sample(self, class_labels: Labels = None, *, output_type: OutputType = "pil", **arguments: Any) -> Any:
        """One image a label, or `num` images of a model without classes: a list of PIL images, or a (B, 3, H, W)
        tensor in [-1, 1], or latents.

        Arguments (defaults in `spec.sampling_defaults`): num (default 1, or as many as seeds), steps, solver, grid,
        eta, guidance (1 = off), guidance_channels (int or "all"), guidance_interval (lo, hi in noise time),
        guidance_schedule ("constant", "linear", "cosine"), guide (a weaker model of the same kind, a Pipeline or
        anything `load` takes, whose output takes the place of the null class's), seed (images get seed, seed+1, …)
        or seeds, height, width (pixels), init_image (a PIL image or file, or one each) with strength (the noise time
        it is brought to, 0.6), batch_size, progress, callback(step), initial_noise (B, C, H, W), step_noise(i, shape).
        For images larger than those of training: rope_scaling ("none", "linear", "ntk" or "time-aware") and
        proportional_attention.
        RequestError names what cannot be served. Image k depends on its seed and init_image alone.
        """
        if output_type == "latent":
            return self.sample_latents(class_labels, **arguments)
        if output_type not in ("pil", "tensor"):
            raise RequestError(f"output_type: expected pil, tensor or latent, got {output_type!r}")
        images = [e for e in self.iterate(class_labels, **arguments) if isinstance(e, Sample)]
        if output_type == "tensor":
            return _stack([picture.tensor for picture in images if picture.tensor is not None])
        return [picture.image for picture in images]

    def sample_latents(self, class_labels: Labels = None, **arguments: Any) -> Tensor:
        """Latents (B, C, h, w) before decoding, fp32 on the CPU; no codec is opened but for `init_image`."""
        events = self._generator(class_labels, False, arguments).events()
        return _stack([event.latent for event in events if isinstance(event, Sample)])

    def iterate(
        self,
        class_labels: Labels = None,
        *,
        cancelled: Callable[[], bool] | None = None,
        preview_every: int = 0,
        **arguments: Any,
    ) -> Iterator[Event]:
        """Previews, finished images and a final Done; stops early when `cancelled()` turns true or the iterator is
        closed."""
        arguments = {**arguments, "cancelled": cancelled, "preview_every": preview_every}
        return self._generator(class_labels, True, arguments).events()

    def _generator(self, class_labels: Labels, decode: bool, arguments: dict[str, Any]) -> Generator:
        running = {name: arguments[name] for name in RUNNING if name in arguments}
        request = {name: value for name, value in arguments.items() if name not in RUNNING}
        guide = named = request.pop("guide", None)
        if isinstance(named, (str, Path)):
            guide = self._guides.get(str(named)) or open_source(named)
        elif named is not None and not isinstance(named, Pipeline):
            raise RequestError(f"guide: expected a Pipeline, a path or a name, got {type(named).__name__}")
        checked = check_request(self.spec, class_labels, guide=None if guide is None else guide.spec, **request)
        if isinstance(guide, Source):  # read once the request is known to be sound
            offload = blocks.is_offloaded(self.model)
            with self._opening:
                guide = self._guides.get(str(named)) or load_source(
                    guide, self.device, self.dtype, offload=offload, inference=self.inference
                )
                self._guides = {str(named): guide}  # the last one
        return Generator(self, checked, guide=guide, decode=decode, **running)


def _stack(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors) if tensors else torch.empty(0)  # a cancelled request may have none


def load(
    source: str | Path,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    ema: bool = True,
    codec_root: str | Path | None = None,
    heads: int | None = None,
    process: ProcessName | None = None,
    offload: bool = False,
    inference: InferenceOptions | None = InferenceOptions(),  # noqa: B008 (frozen)
) -> Pipeline:
    """Open a model: a folder in the original's layout, a folder or run in ours, a DiT or SiT `.pt`, a diffusers
    DiTPipeline folder, a bundled name, or a Hub id. dtype (a torch dtype, "fp32", "bf16" or "fp16"): None is fp32 on
    the CPU, bf16 on CUDA. `ema` takes the EMA weights where kept apart. Neither codec nor text encoder is opened; local
    autoencoders will be looked for in `codec_root` and in the model's own folder. `heads` is for DiT files of unlisted
    sizes, `process` for those that do not tell whether they are DiT's (ddpm) or SiT's (flow).
    `offload` leaves the blocks on the host, for models larger than the device (see `ldit.sampling.fast.offload`).
    `inference` say what the copy that samples is like, int8 and compiled among them (see
    `ldit.sampling.fast.prepare`); with
    None `pipe.model` itself is called, so that hooks on its parts see every evaluation.

    SourceError names what is missing, damaged or unknown; RequestError says that the device has no room for the model,
    or that a switch does not go with it.
    """
    opened = open_source(source, heads, ema, process)
    return load_source(opened, device, dtype, ema, codec_root, offload, inference)


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
    device = torch.device(device) if device is not None else default_device()
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    elif isinstance(dtype, str):
        if dtype not in DTYPES:
            raise RequestError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
        dtype = DTYPES[dtype]
    if inference is not None:
        _check_switches(inference, source.spec, device, dtype, offload)
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
    return Pipeline(model, source.spec, source.path, root, inference=inference)


def _check_switches(
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
    source: Source, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, ema: bool = True
) -> nn.Module:
    """The network with its weights, for inference: built on the meta device, filled tensor by tensor, so that the peak
    of memory is the final size and one tensor."""
    model = build_model(source.spec.model, "meta")
    assign(model, source.tensors(ema), str(source.path), device, dtype)
    return model.eval().requires_grad_(False)


def codec_roots(root: Path | None, source: Path | None) -> list[Path]:
    """Where a model's autoencoder is looked for by name: the folder given, and the checkpoint's own."""
    own = None if source is None else source if source.is_dir() else source.parent
    return [folder for folder in (root, own) if folder is not None]


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
