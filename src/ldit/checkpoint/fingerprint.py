"""Fingerprints of weights: sha256 of the files that hold them."""

import hashlib
from pathlib import Path

from ldit.checkpoint import export
from ldit.checkpoint.layouts import original
from ldit.checkpoint.open import Source
from ldit.storage import manifest
from ldit.storage.shards import has_set, set_files

# Folder and file stem of the network in a diffusers pipeline.
_PART, _STEM = "transformer", "diffusion_pytorch_model"


def weights_fingerprint(source: Source, ema: bool) -> str:
    """Hex sha256 of the weight file that `source.tensors(ema)` reads; for several files, of the lines "NAME SHA256" in
    order. Digests come from the manifest if there is one (reading the weights verifies it); otherwise every byte is
    read once. SourceError names a missing file."""
    if source.path.is_file():
        return manifest.sha256_file(source.path)
    names = _files(source, ema)
    known = manifest.read(source.path) if (source.path / manifest.NAME).is_file() else {}
    digests = [known[name]["sha256"] if name in known else manifest.sha256_file(source.path / name) for name in names]
    if len(digests) == 1:
        return digests[0]
    lines = "".join(f"{name} {digest}\n" for name, digest in zip(names, digests, strict=True))
    return hashlib.sha256(lines.encode(errors="surrogateescape")).hexdigest()


def _files(source: Source, ema: bool) -> list[str]:
    """Names of the weight files, relative to the source's folder."""
    if source.kind == "ldit":
        return export.weight_files(source.path, ema)
    if source.kind == "original":
        return [path.name for path in original.shard_files(source.path, ema)]
    part = source.path / _PART
    names = set_files(part, _STEM) if has_set(part, _STEM) else [f"{_STEM}.bin"]
    return [Path(_PART, name).as_posix() for name in names]
