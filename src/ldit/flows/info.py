"""What a source is, from headers and shapes alone."""

import math
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ldit.checkpoint import manifest
from ldit.checkpoint.autoencoder import holds_autoencoder, open_autoencoder
from ldit.checkpoint.export import kept, read_json, weight_shapes
from ldit.checkpoint.open import open_source
from ldit.codecs.autoencoder import AutoencoderCodec
from ldit.codecs.kl_config import CLASS_NAME, CONFIG, MAX_BYTES, read_kl_config
from ldit.codecs.kl_weights import read_tensors
from ldit.codecs.open import find_codec
from ldit.config.model import TextModelConfig
from ldit.config.spec import AutoencoderConfig, ModelSpec
from ldit.dtypes import dtype_word
from ldit.errors import SourceError
from ldit.nn.build import forward_flops, parameter_count


def describe(source: str | Path, verify: bool = False, heads: int | None = None) -> dict[str, Any]:
    """kind, path, parameters, dtypes and the like of a model; of an autoencoder's run or step, which is kind
    "autoencoder"; or of a codec's folder, kind "autoencoder_kl". FLOPs are those of one forward pass of one picture.

    With `verify` every file is read and checked; SourceError or CodecError names the first fault.
    """
    folder = _folder(source)
    if folder is not None and (_is_codec(folder) or holds_autoencoder(folder)):
        if heads is not None:
            raise SourceError(f"{source} is an autoencoder; heads are those of a DiT .pt")
        report = _codec(folder, verify) if _is_codec(folder) else _autoencoder(folder, verify)
    else:
        report = _model(source, verify, heads)
    return {**report, "verified": True} if verify else report


def _model(source: str | Path, verify: bool, heads: int | None) -> dict[str, Any]:
    opened = open_source(source, heads)
    if verify:
        opened.verify()
    entries = opened.shapes(ema=opened.has_ema())
    spec = opened.spec
    return {
        "kind": opened.kind,
        "path": str(opened.path),
        "parameters": parameter_count(spec.model),
        "entries": len(entries),
        "dtype": _dtype(dtype for _, dtype in entries.values()),
        "weights": [word for word, there in (("raw", opened.has_raw()), ("ema", opened.has_ema())) if there],
        **_size(spec),
        "step": (spec.training or {}).get("step"),
        "config": spec.to_json(),
    }


def _size(spec: ModelSpec) -> dict[str, Any]:
    """FLOPs at the training size; a text model's is its token budget whatever the picture."""
    if isinstance(spec.model, TextModelConfig):
        return {"flops": forward_flops(spec.model, 0, 0), "tokens": spec.model.max_seq_len}
    side = spec.model.input_size
    return {"flops": forward_flops(spec.model, side, side), "image_size": side * spec.codec.factor}


def _autoencoder(folder: Path, verify: bool) -> dict[str, Any]:
    """A step of an autoencoder's run, the newest sound one of a run; its statistics are null before they are
    measured."""
    opened = open_autoencoder(folder)
    if verify and (opened.path / manifest.NAME).exists():
        manifest.verify(opened.path)
    entries, spec = weight_shapes(opened.path, opened.has_ema()), opened.spec
    return {
        "kind": spec.model.kind,
        "path": str(opened.path),
        "parameters": sum(math.prod(shape) for shape, _ in entries.values()),
        "entries": len(entries),
        "dtype": _dtype(dtype_word(dtype) for _, dtype in entries.values()),
        "weights": list(kept(opened.path)),
        "factor": spec.model.factor,
        "latent_channels": spec.model.latent_channels,
        "statistics": spec.to_json().get("latents"),
        "step": (spec.training or {}).get("step"),
        "config": spec.to_json(),
    }


def _codec(folder: Path, verify: bool) -> dict[str, Any]:
    """A folder of diffusers' layout; with `verify` also its fingerprint."""
    own = read_kl_config(folder)
    entries = {name: (tensor.numel(), tensor.dtype) for name, tensor in read_tensors(folder)}
    report = {
        "kind": AutoencoderConfig().kind,
        "path": str(folder),
        "parameters": sum(count for count, _ in entries.values()),
        "entries": len(entries),
        "dtype": _dtype(dtype_word(str(dtype).removeprefix("torch.")) for _, dtype in entries.values()),
        "factor": own.factor,
        "latent_channels": own.latent_channels,
        "scale": own.scaling[0],
        "shift": own.scaling[1],
        "config": read_json(folder / CONFIG),
    }
    if not verify:
        return report
    if (folder / manifest.NAME).exists():
        manifest.verify(folder)
    codec = AutoencoderCodec(AutoencoderConfig(str(folder), *own.scaling, own.factor), folder)
    return {**report, "fingerprint": codec.fingerprint()}


def _folder(source: str | Path) -> Path | None:
    """The folder that is meant, where it is no model of the Hub: a place before a bundled name, as everywhere."""
    with suppress(OSError, ValueError, RuntimeError):  # too long for a name, with a NUL, ~ of nobody
        path = Path(source).expanduser()
        if path.exists():
            return path if path.is_dir() else None
    return find_codec(str(source))


def _is_codec(folder: Path) -> bool:
    with suppress(OSError, SourceError):
        if (folder / CONFIG).is_file() and (folder / CONFIG).stat().st_size <= MAX_BYTES:
            content = read_json(folder / CONFIG)
            return isinstance(content, dict) and content.get("_class_name") == CLASS_NAME
    return False


def _dtype(words: Iterable[str]) -> str | dict[str, int]:
    """The dtype of all, or how many entries are of which."""
    counts = Counter(words)
    return counts.most_common(1)[0][0] if len(counts) == 1 else dict(counts)
