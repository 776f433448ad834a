"""The ldit layout: config.json, model.safetensors (or shards with an index), and ema.safetensors if separate.

It has a folder codec/ if the codec was given by path.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ldit.checkpoint.eight_bits import SCALE, packed, unpacked
from ldit.config.autoencoder import AUTOENCODER
from ldit.config.kinds import AnySpec, spec_from_json
from ldit.config.spec import ModelSpec
from ldit.errors import ConfigError, SourceError
from ldit.storage import manifest
from ldit.storage.atomic import read_json, write_json
from ldit.storage.shards import has_set, index_name, set_files
from ldit.storage.tensors import NamedTensors, read_safetensors, safetensors_shapes, write_safetensors

CONFIG = "config.json"
MODEL = "model"
EMA = "ema"


def is_export(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and (has_set(folder, MODEL) or has_set(folder, EMA))


def write_export(
    folder: Path,
    spec: ModelSpec,
    weights: NamedTensors,
    ema: NamedTensors | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the files into an existing folder (see `atomic.committed`); int8 as `eight_bits` does."""
    write_json(folder / CONFIG, spec.to_json())
    if dtype == torch.int8:
        weights, ema, dtype = packed(weights), None if ema is None else packed(ema), None
    write_safetensors(folder / f"{MODEL}.safetensors", weights, dtype)
    if ema is not None:
        write_safetensors(folder / f"{EMA}.safetensors", ema, dtype)


def read_any_spec(folder: Path) -> AnySpec:
    """The content of config.json."""
    data, where = read_json(folder / CONFIG), str(folder / CONFIG)
    try:
        return spec_from_json(data, where)
    except ConfigError as error:
        raise SourceError(str(error)) from None


def read_spec(folder: Path) -> ModelSpec:
    """The ModelSpec of config.json; for an autoencoder or a classifier, SourceError says what it can be used for."""
    spec = read_any_spec(folder)
    if not isinstance(spec, ModelSpec):
        raise no_model(folder, spec.model.kind)
    return spec


def no_model(folder: Path, kind: str) -> SourceError:
    """The error for an autoencoder or a classifier where a diffusion model is expected."""
    if kind == AUTOENCODER:
        return SourceError(
            f"{folder} is an autoencoder, which makes no images by itself "
            f"(ldit convert {folder} OUT --to diffusers makes a codec of it)"
        )
    return SourceError(f"{folder} is a {kind}, which makes no images: it is an extractor of evaluation")


def weight_files(folder: Path, ema: bool) -> list[str]:
    """Names of the files that hold the weights: with `ema` the EMA weights if they are separate, else the only ones."""
    return set_files(folder, EMA if ema and has_ema(folder) else MODEL)


def verify_export(folder: Path, ema: bool) -> None:
    """Verify the manifest, the configuration and the weight files that will be read.

    A committed step, recognised by its training state, must have a manifest; an export may lack it. Large files that
    were verified before and have not changed since are not read again.
    """
    if (folder / manifest.NAME).exists() or (folder / "state").is_dir():
        manifest.verify(folder, [CONFIG, *_indices(folder), *weight_files(folder, ema)], remembered=True)


def _indices(folder: Path) -> list[str]:
    return [name for name in map(index_name, (MODEL, EMA)) if (folder / name).is_file()]


def has_ema(folder: Path) -> bool:
    """Whether there are separate EMA weights. Files listed in the manifest count, so that a missing one is noticed."""
    if has_set(folder, EMA):
        return True
    listed = manifest.read(folder) if (folder / manifest.NAME).is_file() else {}
    return f"{EMA}.safetensors" in listed or index_name(EMA) in listed


def kept(folder: Path) -> tuple[str, ...]:
    """Which weights the folder has: "raw", "ema" (separate EMA weights), or both."""
    return (("raw",) if has_set(folder, MODEL) else ()) + (("ema",) if has_ema(folder) else ())


def read_weights(folder: Path, ema: bool) -> Iterator[tuple[str, Tensor]]:
    """Named tensors, memory-mapped, one by one; not verified."""
    for name in weight_files(folder, ema):
        yield from unpacked(read_safetensors(folder / name))


def weight_shapes(folder: Path, ema: bool) -> dict[str, tuple[tuple[int, ...], str]]:
    """name -> (shape, dtype word), from the headers of the files."""
    shapes = {}
    for name in weight_files(folder, ema):
        shapes.update(safetensors_shapes(folder / name))
    return {name: entry for name, entry in shapes.items() if not name.endswith(SCALE)}
