"""Our layout: config.json + model.safetensors (or shards with an index) + ema.safetensors when kept apart."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldit.checkpoint import manifest
from ldit.checkpoint.commit import write_json
from ldit.checkpoint.tensors import NamedTensors, read_safetensors, safetensors_shapes, write_safetensors
from ldit.config.spec import ModelSpec
from ldit.errors import ConfigError, SourceError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
EMA_WEIGHTS = "ema.safetensors"
INDEX = "model.safetensors.index.json"


def is_export(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and (
        (folder / WEIGHTS).exists() or (folder / INDEX).exists() or (folder / EMA_WEIGHTS).exists()
    )


def write_export(
    folder: Path,
    spec: ModelSpec,
    weights: NamedTensors,
    ema: NamedTensors | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the files into an existing folder (see `commit.committed`)."""
    write_json(folder / CONFIG, spec.to_json())
    write_safetensors(folder / WEIGHTS, weights, dtype)
    if ema is not None:
        write_safetensors(folder / EMA_WEIGHTS, ema, dtype)


def read_json(path: Path) -> Any:
    """Parsed JSON; SourceError names the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SourceError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{path} is damaged: {error}") from None


def read_spec(folder: Path) -> ModelSpec:
    """The ModelSpec of config.json."""
    try:
        return ModelSpec.from_json(read_json(folder / CONFIG), str(folder / CONFIG))
    except ConfigError as error:
        raise SourceError(str(error)) from None


def weight_files(folder: Path, ema: bool) -> list[str]:
    """Names of the files that hold the weights asked for: EMA where kept apart, else the only ones."""
    if ema and has_ema(folder):
        return [EMA_WEIGHTS]
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    if not (folder / INDEX).is_file():
        raise SourceError(f"{folder} has neither {WEIGHTS} nor {INDEX}")
    table = read_json(folder / INDEX)
    files = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(files, dict) or not files or not all(isinstance(f, str) for f in files.values()):
        raise SourceError(f"{folder / INDEX} is damaged: no weight_map")
    names = sorted(set(files.values()))
    for name in names:
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise SourceError(f"{folder / INDEX}: {name!r} is not the name of a weight file beside it")
        if not _is_file(folder / name):
            raise SourceError(f"{folder / name} is missing")
    return names


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name longer than the file system takes
        return False


def verify_export(folder: Path, ema: bool) -> None:
    """Check the manifest, the configuration and the weight files that will be read.

    A committed step (it has training state) must have its manifest; an export may come without one.
    """
    if (folder / manifest.NAME).exists() or (folder / "state").is_dir():
        manifest.verify(folder, [CONFIG, *weight_files(folder, ema)])


def has_ema(folder: Path) -> bool:
    """Whether EMA weights are kept apart; a file that the manifest lists counts, so that its loss is noticed."""
    if (folder / EMA_WEIGHTS).is_file():
        return True
    return (folder / manifest.NAME).is_file() and EMA_WEIGHTS in manifest.read(folder)


def kept(folder: Path) -> tuple[str, ...]:
    """Which weights the folder keeps: "raw", "ema" (kept apart), or both."""
    raw = (folder / WEIGHTS).exists() or (folder / INDEX).exists()
    return (("raw",) if raw else ()) + (("ema",) if has_ema(folder) else ())


def read_weights(folder: Path, ema: bool) -> Iterator[tuple[str, Tensor]]:
    for name in weight_files(folder, ema):
        yield from read_safetensors(folder / name)


def weight_shapes(folder: Path, ema: bool) -> dict[str, tuple[tuple[int, ...], str]]:
    shapes = {}
    for name in weight_files(folder, ema):
        shapes.update(safetensors_shapes(folder / name))
    return shapes
