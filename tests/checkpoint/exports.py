"""Tools that change a folder in our layout: its configuration, its shards, its headers."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def configured(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(change(data) or data))


def section(name: str, **values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda data: data[name].update(values)


def shard(folder: Path, weights: dict[str, torch.Tensor], parts: int = 3) -> dict[str, str]:
    """Replace model.safetensors by shards as the Hub's tools write them."""
    (folder / "model.safetensors").unlink()
    table = {}
    for part in range(parts):
        name = f"model-{part + 1:05d}-of-{parts:05d}.safetensors"
        names = list(weights)[part::parts]
        save_file({n: weights[n] for n in names}, folder / name, metadata={"format": "pt"})
        table.update(dict.fromkeys(names, name))
    write_index(folder, table)
    return table


def write_index(folder: Path, table: Any) -> None:
    data = {"metadata": {"total_size": 1}, "weight_map": table}
    (folder / "model.safetensors.index.json").write_text(json.dumps(data))


def header(text: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text + data
