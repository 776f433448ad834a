"""`ldit.load`: a source to an object that makes pictures."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ldit.checkpoint.open import Source, open_source
from ldit.checkpoint.tensors import assign
from ldit.codecs.autoencoder import AutoencoderCodec
from ldit.codecs.open import Codec, open_codec
from ldit.config.spec import ModelSpec
from ldit.dtypes import DTYPES
from ldit.errors import RequestError
from ldit.flows.generate import Event, Generator, Picture
from ldit.flows.request import Labels, check_request
from ldit.nn.build import build_model

OutputType = Literal["pil", "tensor", "latent"]
RUNNING = ("batch_size", "progress", "callback", "cancelled", "preview_every")  # arguments of the run, not the request


class Pipeline:
    """Weights and all they need to become pictures.

    `model` is the raw network; `spec` is the content of config.json (a dict, and its parts as attributes). Calling the
    pipeline samples; see `sample`.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: ModelSpec,
        source: Path | None = None,
        codec_root: Path | None = None,
        dtype: torch.dtype | None = None,
        codec: Codec | None = None,
    ) -> None:
        self.model, self.spec, self.source, self.codec_root = model, spec, source, codec_root
        self._dtype = dtype
        self._codec = codec

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the network takes: its parameters' dtype, or the one given where those are cast as they are used."""
        return self._dtype or next(self.model.parameters()).dtype

    def to(self, *args: Any, **kwargs: Any) -> "Pipeline":
        """Move or convert the network, as torch.nn.Module.to; an autoencoder moves with it."""
        self.model.to(*args, **kwargs)
        if isinstance(self._codec, AutoencoderCodec):
            self._codec.to(self.device, self._codec_dtype)
        return self

    @property
    def codec(self) -> Codec:
        """Opened at first use on the network's device; CodecError when it is not at hand."""
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
        """One picture a label, or `num` pictures of a model without classes: a list of PIL images, or a (B, 3, H, W)
        tensor in [-1, 1], or latents.

        Arguments (defaults in `spec.sampling_defaults`): num (default 1, or as many as seeds), steps, solver, grid,
        eta, guidance (1 = off), guidance_channels (int or "all"), guidance_interval (lo, hi in noise time), seed
        (pictures get seed, seed+1, …) or seeds, height, width (pixels), batch_size, progress, callback(step),
        initial_noise (B, C, H, W), step_noise(i, shape).
        RequestError names what cannot be served. Picture k depends on its seed alone.
        """
        if output_type == "latent":
            return self.sample_latents(class_labels, **arguments)
        if output_type not in ("pil", "tensor"):
            raise RequestError(f"output_type: expected pil, tensor or latent, got {output_type!r}")
        pictures = [e for e in self.iterate(class_labels, **arguments) if isinstance(e, Picture)]
        if output_type == "tensor":
            return _stack([picture.tensor for picture in pictures if picture.tensor is not None])
        return [picture.image for picture in pictures]

    def sample_latents(self, class_labels: Labels = None, **arguments: Any) -> Tensor:
        """Latents (B, C, h, w) before decoding, fp32 on the CPU; no codec is opened."""
        events = self._generator(class_labels, False, arguments).events()
        return _stack([event.latent for event in events if isinstance(event, Picture)])

    def iterate(
        self,
        class_labels: Labels = None,
        *,
        cancelled: Callable[[], bool] | None = None,
        preview_every: int = 0,
        **arguments: Any,
    ) -> Iterator[Event]:
        """Previews, finished pictures and a final Done; stops early when `cancelled()` turns true or the iterator is
        closed."""
        arguments = {**arguments, "cancelled": cancelled, "preview_every": preview_every}
        return self._generator(class_labels, True, arguments).events()

    def _generator(self, class_labels: Labels, decode: bool, arguments: dict[str, Any]) -> Generator:
        running = {name: arguments[name] for name in RUNNING if name in arguments}
        request = {name: value for name, value in arguments.items() if name not in RUNNING}
        return Generator(self, check_request(self.spec, class_labels, **request), decode=decode, **running)


def _stack(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors) if tensors else torch.empty(0)  # a cancelled request may have none


def load(
    source: str | Path,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    ema: bool = True,
    codec_root: str | Path | None = None,
    heads: int | None = None,
) -> Pipeline:
    """Open a model: a folder in the original's layout, a folder or run in ours, a facebookresearch/DiT `.pt`, a
    bundled name, or a Hub id. dtype (a torch dtype, "fp32", "bf16" or "fp16"): None is fp32 on the CPU, bf16 on CUDA.
    `ema` takes the EMA weights where kept apart. Neither codec nor text encoder is opened; local autoencoders will be
    looked for in `codec_root` and in the model's own folder. `heads` is for DiT files of unlisted sizes.

    SourceError names what is missing, damaged or unknown.
    """
    return load_source(open_source(source, heads, ema), device, dtype, ema, codec_root)


def load_source(
    source: Source,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    ema: bool = True,
    codec_root: str | Path | None = None,
) -> Pipeline:
    """`load` for a source that is open already."""
    device = torch.device(device) if device is not None else default_device()
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    elif isinstance(dtype, str):
        if dtype not in DTYPES:
            raise RequestError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
        dtype = DTYPES[dtype]
    model = load_model(source, device, dtype, ema)
    return Pipeline(model, source.spec, source.path, Path(codec_root) if codec_root else None)


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


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
