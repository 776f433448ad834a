"""What a source is, from headers and shapes alone."""

from collections import Counter
from pathlib import Path
from typing import Any

from ldit.checkpoint.open import open_source
from ldit.config.model import TextModelConfig
from ldit.config.spec import ModelSpec
from ldit.nn.build import forward_flops, parameter_count


def describe(source: str | Path, verify: bool = False, heads: int | None = None) -> dict[str, Any]:
    """kind, path, sizes, parameters, FLOPs of one forward pass of one picture, dtypes, step; with `verify` every file
    is read and checked (SourceError names the first fault)."""
    opened = open_source(source, heads)
    if verify:
        opened.verify()
    entries = opened.shapes(ema=opened.has_ema())
    spec = opened.spec
    dtypes = Counter(dtype for _, dtype in entries.values())
    report = {
        "kind": opened.kind,
        "path": str(opened.path),
        "parameters": parameter_count(spec.model),
        "entries": len(entries),
        "dtype": dtypes.most_common(1)[0][0] if len(dtypes) == 1 else dict(dtypes),
        "weights": [word for word, there in (("raw", opened.has_raw()), ("ema", opened.has_ema())) if there],
        **_size(spec),
        "step": (spec.training or {}).get("step"),
        "config": spec.to_json(),
    }
    return {**report, "verified": True} if verify else report


def _size(spec: ModelSpec) -> dict[str, Any]:
    """FLOPs at the training size; a text model's is its token budget whatever the picture."""
    if isinstance(spec.model, TextModelConfig):
        return {"flops": forward_flops(spec.model, 0, 0), "tokens": spec.model.max_seq_len}
    side = spec.model.input_size
    return {"flops": forward_flops(spec.model, side, side), "image_size": side * spec.codec.factor}
