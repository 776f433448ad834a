"""A checkpoint in another layout, written whole or not at all."""

import os
from pathlib import Path
from typing import Literal

import torch

from ldit.checkpoint.commit import committed, fsync
from ldit.checkpoint.export import write_export
from ldit.checkpoint.open import Source, open_source
from ldit.checkpoint.original import check_original, write_original
from ldit.errors import SourceError

Layout = Literal["ldit", "original", "diffusers", "pt"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def convert(
    source: str | Path,
    out: Path,
    to: Layout = "ldit",
    dtype: str | None = None,
    ema_only: bool = False,
    heads: int | None = None,
) -> Path:
    """Write `source` to `out` in layout `to`; SourceError names impossible pairs and an `out` that exists."""
    opened = open_source(source, heads)
    if out.exists():
        raise SourceError(f"{out} exists already; choose another name")
    if ema_only and not opened.has_ema():
        raise SourceError(f"{opened.path} keeps no EMA weights apart")
    if dtype is not None and to != "ldit":
        raise SourceError(f"layout {to!r} holds fp32 weights; dtype goes with layout 'ldit'")
    raw = opened.has_raw() and not ema_only
    ema = opened.has_ema()
    if to == "diffusers":
        raise SourceError("layout 'diffusers' is not built yet")
    if to == "pt":
        return _write_pt(opened, out, raw, ema)
    if to == "original":
        check_original(opened.spec)
    with committed(out) as folder:
        weights = opened.tensors(ema=not raw)
        average = opened.tensors(ema=True) if raw and ema else None
        if to == "ldit":
            write_export(folder, opened.spec, weights, average, DTYPES.get(dtype or ""))
        else:
            step = (opened.spec.training or {}).get("step")
            # A model with one set of weights is both to the original, which samples from EMA by default.
            write_original(folder, opened.spec, weights, average or opened.tensors(ema=not raw), step)
    return out


def _write_pt(opened: Source, out: Path, raw: bool, ema: bool) -> Path:
    if opened.spec.model.kind != "dit":
        raise SourceError(f"a DiT .pt cannot hold a model of kind {opened.spec.model.kind!r}")
    state: object = {name: t.clone() for name, t in opened.tensors(ema=not raw)}
    if raw and ema:
        state = {"model": state, "ema": {name: t.clone() for name, t in opened.tensors(ema=True)}}
    temporary = out.with_name(out.name + ".tmp")
    torch.save(state, temporary)
    fsync(temporary)
    os.replace(temporary, out)
    return out
