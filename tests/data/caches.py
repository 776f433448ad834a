"""A latent cache that is not written by the code that writes them, and what its samples should be."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from damage import sign
from safetensors.torch import save_file

from ldit.data.latent_cache.reader import LatentSamples

CHANNELS, SIDE, FACTOR = 3, 2, 4
ROWS, LAST = (4, 0, 3), (4, 6, 9)  # of three shards; the second lost both of its images
CODEC, SOURCE = "c0de" * 16, "50ce" * 16


def body(dtype: str = "bf16", **changes: Any) -> dict[str, Any]:
    """The description of the cache below."""
    codec = {"name": "some/vae", "fingerprint": CODEC, "factor": FACTOR, "channels": CHANNELS,
             "scale": [1.0, 2.0, 3.0], "shift": 0}  # fmt: skip
    names = [f"shard-{i:05d}.safetensors" for i in range(3)]
    shards = [{"file": name, "first": first, "last": last, "rows": rows}
              for name, first, last, rows in zip(names, (0, *LAST), LAST, ROWS, strict=False)]  # fmt: skip
    return {
        "version": 1, "codec": codec, "crop": "adm-center", "size": SIDE * FACTOR, "flips": ["plain", "flipped"],
        "dtype": dtype, "precision": "fp32", "shape": [2, CHANNELS, SIDE, SIDE], "names": ["cat", "dog"],
        "source": {"pictures": 9, "sha256": SOURCE, "decoding": {"exif": False}}, "heldout": None, "shard_size": 4,
        "skipped": [["a/4.png", "empty"], ["a/5.png", "empty"]], "shards": shards, **changes,
    }  # fmt: skip


def tensors(dtype: str) -> list[dict[str, torch.Tensor]]:
    """Random bits that are numbers, so that bf16 is full width."""
    generator = torch.Generator().manual_seed(0)
    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    made = []
    for rows in ROWS:
        shape = (rows, 2, CHANNELS, SIDE, SIDE)
        mean, logvar = (torch.randn(shape, generator=generator).to(kind) for _ in range(2))
        made.append({"mean": mean, "logvar": logvar, "label": torch.arange(rows) % 2})
    return made


def seal(root: Path, cache: dict[str, Any]) -> None:
    """Write the manifest, true for what lies there."""
    names = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file() and p.name != "manifest.json")
    files = {}
    for name in names:
        data = (root / name).read_bytes()
        files[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (root / "manifest.json").write_text(json.dumps(sign({"format": 1, "files": files, "cache": cache})))


def build(root: Path, dtype: str = "bf16") -> Path:
    root.mkdir(parents=True)
    for number, shard in enumerate(tensors(dtype)):
        save_file(shard, root / f"shard-{number:05d}.safetensors")
    seal(root, body(dtype))
    return root


def read(latents: LatentSamples, index: int, flip: bool) -> tuple[torch.Tensor, int]:
    out = torch.full(latents.shape, float("nan"))
    return out, latents.read(index, flip, out.numpy())


def seal_with_heldout(cache: Path) -> None:
    made = body(heldout={"pictures": 9, "sha256": SOURCE})
    names = [p for p in cache.rglob("*") if p.is_file() and p != cache / "manifest.json"]
    files = {
        p.relative_to(cache).as_posix(): {
            "size": p.stat().st_size,
            "sha256": hashlib.sha256(p.read_bytes()).hexdigest(),
        }
        for p in names
    }
    (cache / "manifest.json").write_text(json.dumps(sign({"format": 1, "files": files, "cache": made})))
