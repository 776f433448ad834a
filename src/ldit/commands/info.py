"""`ldit info`: describes a source from headers and shapes, without reading its weights."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ldit.checkpoint.autoencoder import holds_autoencoder, open_autoencoder
from ldit.checkpoint.classifier import holds_classifier, open_classifier_step
from ldit.checkpoint.export import kept, weight_shapes
from ldit.checkpoint.layouts.dit_pt import ProcessName
from ldit.checkpoint.open import open_source
from ldit.codecs.autoencoder import AutoencoderCodec
from ldit.codecs.kl_config import CLASS_NAME, CONFIG, MAX_BYTES, read_kl_config
from ldit.codecs.kl_weights import read_tensors
from ldit.codecs.open import find_codec
from ldit.config.kinds import AnySpec
from ldit.config.model import TextModelConfig
from ldit.config.requests.convert import InfoRequest
from ldit.config.spec import AutoencoderConfig, ModelSpec
from ldit.errors import SourceError, some
from ldit.nn.build import forward_flops, parameter_count
from ldit.precision import dtype_word
from ldit.readable import count
from ldit.storage import manifest
from ldit.storage.atomic import read_json


def run(request: InfoRequest) -> int:
    """`ldit info`."""
    report = describe(request.source, request.verify, request.heads, request.process)
    if request.json:
        print(json.dumps(report))
    else:
        for key, text in _rows(report):
            print(f"{key:<15}{text}")
    return 0


def _rows(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The report for people: numbers in few characters, the configuration as a row for each of its sections. Of class
    names the first are shown."""
    for key, value in report.items():
        if key == "config":
            yield from _sections(value)
        elif key == "parameters":
            yield key, f"{count(value)} in {report['entries']} tensors"
        elif key == "flops":
            side = f" for an image of {report['image_size']} x {report['image_size']}" if "image_size" in report else ""
            yield "forward", f"{value / 1e9:.3g} GFLOP{side}"
        elif key == "weights":
            yield key, " and ".join(value)
        elif key == "step":
            yield key, f"{value:,}" if isinstance(value, int) else "not stated"
        elif key not in ("entries", "image_size") or ("flops" not in report and key == "image_size"):
            yield key, json.dumps(value) if isinstance(value, (dict, list)) else str(value)


def _sections(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """A row for each section of a configuration, with what is set in it."""
    plain = {key: value for key, value in config.items() if not isinstance(value, dict)}
    for section, values in [*((k, v) for k, v in config.items() if isinstance(v, dict)), ("other", plain)]:
        parts = []
        for key, value in values.items():
            if key == "names" and isinstance(value, list):
                parts.append(f"{len(value)} names ({some(value, 3)}; all with --json)")
            elif value not in (None, False, 0, "", [], {}):
                parts.append(f"{key} {json.dumps(value) if isinstance(value, (dict, list)) else value}")
        if section == "other":
            parts = [part for part in parts if not part.startswith("format ")]
        if parts:
            yield f"  {section}", ", ".join(parts)


def describe(
    source: str | Path, verify: bool = False, heads: int | None = None, process: ProcessName | None = None
) -> dict[str, Any]:
    """Kind, path, parameters, dtypes and more of a model, a run or step of an autoencoder (kind "autoencoder") or of a
    classifier ("classifier"), or a codec folder ("autoencoder_kl"). FLOPs are those of a forward pass for one image.

    `heads` and `process` as in `open_source`. With `verify`, every file is read and checked; SourceError or CodecError
    names the first damaged one.
    """
    folder = _folder(source)
    report = (
        None
        if folder is None
        else _other(folder, source, verify, {"heads are those": heads, "process is that": process})
    )
    if report is None:
        report = _model(source, verify, heads, process)
    return {**report, "verified": True} if verify else report


def _other(folder: Path, source: str | Path, verify: bool, of_pt: dict[str, Any]) -> dict[str, Any] | None:
    """The report on a folder that holds an autoencoder, a classifier or a codec; None for others. `of_pt`: the options
    that apply to DiT .pt files only, by the words of the error."""
    for what, known, report_of in (
        ("an autoencoder", _is_codec, _codec),
        ("an autoencoder", holds_autoencoder, _autoencoder),
        ("a classifier", holds_classifier, _classifier),
    ):
        if known(folder):
            for words, given in of_pt.items():
                if given is not None:
                    raise SourceError(f"{source} is {what}; {words} of a DiT .pt")
            return report_of(folder, verify)
    return None


def _model(source: str | Path, verify: bool, heads: int | None, process: ProcessName | None) -> dict[str, Any]:
    opened = open_source(source, heads, process=process)
    if verify:
        opened.verify()
    entries = opened.shapes(ema=opened.has_ema())
    spec = opened.spec
    # Of a network of the user's only the tensors are known.
    own = "network" in (spec.training or {})
    parameters = sum(math.prod(shape) for shape, _ in entries.values()) if own else parameter_count(spec.model)
    return {
        "kind": opened.kind,
        "path": str(opened.path),
        "parameters": parameters,
        "entries": len(entries),
        "dtype": _dtype(dtype for _, dtype in entries.values()),
        "weights": [word for word, there in (("raw", opened.has_raw()), ("ema", opened.has_ema())) if there],
        **({"network": spec.training["network"]} if own and spec.training else _size(spec)),
        "step": (spec.training or {}).get("step"),
        "config": spec.to_json(),
    }


def _size(spec: ModelSpec) -> dict[str, Any]:
    """FLOPs at the size of training; for a text model, those of its token budget."""
    if isinstance(spec.model, TextModelConfig):
        return {"flops": forward_flops(spec.model, 0, 0), "tokens": spec.model.max_seq_len}
    side = spec.model.input_size
    return {"flops": forward_flops(spec.model, side, side), "image_size": side * spec.codec.factor}


def _autoencoder(folder: Path, verify: bool) -> dict[str, Any]:
    """The report on a step of an autoencoder's run, or the run's latest valid step. Statistics are null until they have
    been measured."""
    opened = open_autoencoder(folder)
    own = {
        "factor": opened.spec.model.factor,
        "latent_channels": opened.spec.model.latent_channels,
        "statistics": opened.spec.to_json().get("latents"),
    }
    return _step(opened.path, opened.spec, own, verify)


def _classifier(folder: Path, verify: bool) -> dict[str, Any]:
    """The report on a step of a classifier's run, or the run's latest valid step."""
    opened = open_classifier_step(folder)
    spec = opened.spec
    own = {
        "image_size": spec.image_size,
        "features": spec.model.widths[-1],
        "classes": len(spec.names),
        "fingerprint": opened.fingerprint(),
    }
    return _step(opened.path, spec, own, verify)


def _step(folder: Path, spec: AnySpec, own: dict[str, Any], verify: bool) -> dict[str, Any]:
    """The report on a step of an autoencoder's or classifier's run, including the entries `own`."""
    if verify and (folder / manifest.NAME).exists():
        manifest.verify(folder)
    entries = weight_shapes(folder, ema=True)
    return {
        "kind": spec.model.kind,
        "path": str(folder),
        "parameters": sum(math.prod(shape) for shape, _ in entries.values()),
        "entries": len(entries),
        "dtype": _dtype(dtype_word(dtype) for _, dtype in entries.values()),
        "weights": list(kept(folder)),
        **own,
        "step": (spec.training or {}).get("step"),
        "config": spec.to_json(),
    }


def _codec(folder: Path, verify: bool) -> dict[str, Any]:
    """The report on a codec folder in diffusers' layout; with `verify` also its fingerprint."""
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
    """The folder of a source: a path, else that of a bundled codec; None for files and other sources."""
    with suppress(OSError, ValueError, RuntimeError):  # name too long, NUL in it, ~ of an unknown user
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
    """The dtype of all entries, or the number of entries of each dtype."""
    counts = Counter(words)
    return counts.most_common(1)[0][0] if len(counts) == 1 else dict(counts)
