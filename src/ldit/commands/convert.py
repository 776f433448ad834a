"""`ldit convert`: writes a checkpoint in another layout, atomically."""

from dataclasses import replace
from pathlib import Path

import torch

from ldit.checkpoint.autoencoder import holds_autoencoder, open_autoencoder, write_diffusers
from ldit.checkpoint.export import write_export
from ldit.checkpoint.layouts.dit_pt import ProcessName, check_dit_pt, content
from ldit.checkpoint.layouts.original import check_original, write_original
from ldit.checkpoint.open import Source, open_source
from ldit.codecs.autoencoder import check_folder
from ldit.codecs.open import copy_codec, private_codec
from ldit.config.requests.convert import ConvertRequest, Layout
from ldit.config.spec import AutoencoderConfig, ModelSpec
from ldit.errors import SourceError
from ldit.log import logger
from ldit.precision import DTYPES
from ldit.storage.manifest import check_not_in_checkpoint
from ldit.storage.outputs import whole, whole_folder

CODEC = "codec"  # folder of the codec in an export, and its name in config.json


WRITTEN = {**DTYPES, "int8": torch.int8}
"""Dtypes of exports."""


def run(request: ConvertRequest) -> int:
    """`ldit convert`."""
    r = request
    print(convert(r.source, r.out, r.to, r.dtype, r.ema_only, r.heads, r.process))
    return 0


def convert(
    source: str | Path,
    out: Path,
    to: Layout = "ldit",
    dtype: str | None = None,
    ema_only: bool = False,
    heads: int | None = None,
    process: ProcessName | None = None,
) -> Path:
    """Write `source` to `out` in layout `to`; `heads` and `process` as in `open_source`. An export in our layout
    includes a copy of a codec that is given by path.

    SourceError for impossible pairs and an `out` that exists; CodecError for a codec that does not fit the model.
    """
    # Autoencoders have a layout of their own.
    if Path(source).is_dir() and holds_autoencoder(Path(source)):
        for words, given in (("heads are those", heads), ("process is that", process)):
            if given is not None:
                raise SourceError(f"{source} is an autoencoder; {words} of a DiT .pt")
        if dtype == "int8":
            raise SourceError(f"{source} is an autoencoder; int8 is for diffusion models")
        return _convert_autoencoder(Path(source), out, to, dtype)
    # Refuse what cannot be written, before weights are read.
    opened = open_source(source, heads, process=process)
    _check_out(out)
    if to != "pt" and out.suffix in (".pt", ".pth", ".safetensors", ".bin"):
        raise SourceError(f"{out}: layout {to!r} is a folder; name one, or give --to pt for a DiT .pt file")
    if ema_only and not opened.has_ema():
        raise SourceError(f"{opened.path} has no separate EMA weights")
    if dtype is not None and to != "ldit":
        raise SourceError(f"layout {to!r} holds fp32 weights; dtype goes with layout 'ldit'")
    raw = opened.has_raw() and not ema_only
    ema = opened.has_ema()
    if to == "diffusers":
        raise SourceError(f"{opened.path} is a diffusion model: layout 'diffusers' is written of autoencoders alone")
    if to == "pt":
        return _write_pt(opened, out, raw, ema)
    if to == "original":
        check_original(opened.spec)
    # Write into a temporary folder that is renamed at the end, so that `out` is complete or missing.
    codec = _codec_to_copy(opened, out) if to == "ldit" else None
    with whole_folder(out) as folder:
        weights = opened.tensors(ema=not raw)
        average = opened.tensors(ema=True) if raw and ema else None
        if to == "ldit":
            write_export(folder, _with_codec(opened.spec, codec, folder), weights, average, WRITTEN.get(dtype or ""))
        else:
            step = (opened.spec.training or {}).get("step")
            # The original samples from EMA by default: a single set of weights is written as both.
            write_original(folder, opened.spec, weights, average or opened.tensors(ema=not raw), step)
    return out


def _codec_to_copy(opened: Source, out: Path) -> Path | None:
    """The folder of a codec that is given by path, else None; CodecError when it does not fit the model."""
    codec = opened.spec.codec
    if not isinstance(codec, AutoencoderConfig):
        return None
    own = opened.path if opened.path.is_dir() else opened.path.parent
    folder = private_codec(codec.name, own)
    if folder is not None:
        check_folder(codec, folder, opened.spec.model.in_channels)
    elif Path(codec.name).is_absolute():
        logger.warning("the autoencoder %s was not found: %s names it by that path", codec.name, out)
    return folder


def _with_codec(spec: ModelSpec, codec: Path | None, folder: Path) -> ModelSpec:
    """The export's spec; `codec` is copied into the export's `folder`."""
    if codec is None:
        return spec
    assert isinstance(spec.codec, AutoencoderConfig)
    copy_codec(codec, folder / CODEC)
    return replace(spec, codec=replace(spec.codec, name=CODEC))


def _check_out(out: Path) -> None:
    if not out.absolute().parent.is_dir():
        raise SourceError(f"no folder {out.absolute().parent} to write {out.name} into")
    check_not_in_checkpoint(out.absolute().parent)
    if out.exists():
        raise SourceError(f"{out} exists already; choose another name")


def _convert_autoencoder(source: Path, out: Path, to: Layout, dtype: str | None) -> Path:
    """Write the EMA weights of an autoencoder's run as a codec folder."""
    opened = open_autoencoder(source)
    _check_out(out)
    if to != "diffusers":
        raise SourceError(f"{opened.path} is an autoencoder: it is written as --to diffusers, not {to}")
    with whole_folder(out) as folder:
        write_diffusers(folder, opened.spec, opened.tensors(), DTYPES.get(dtype or ""))
    if opened.spec.latents is None:
        logger.warning(
            "%s never measured its latents (heldout.every, heldout.num): %s is written without scale and shift, and "
            "readers assume 0.18215 and 0",
            opened.path, out,
        )  # fmt: skip
    return out


def _write_pt(opened: Source, out: Path, raw: bool, ema: bool) -> Path:
    """Write a DiT .pt file with the weights chosen."""
    left_out = check_dit_pt(opened.spec)
    kept = [("model", False)] * raw + [("ema", True)] * ema
    states = {key: {name: t.clone() for name, t in opened.tensors(ema=average)} for key, average in kept}
    needs = sum(t.numel() * t.element_size() for state in states.values() for t in state.values())
    with whole(out, needs) as temporary:
        torch.save(content(opened.spec, states), temporary)
    if left_out:
        logger.warning("%s does not hold %s", out, " nor ".join(left_out))
    return out
