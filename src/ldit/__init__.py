"""ldit: diffusion transformers. `ldit.load(source)` opens a model; see README.md."""

from typing import TYPE_CHECKING, Any

from ldit.version import __version__

if TYPE_CHECKING:
    from ldit.nn.conditioning import TextCondition
    from ldit.pipeline.load import Pipeline, load

__all__ = ["Pipeline", "TextCondition", "__version__", "load"]

_HOMES = {"Pipeline": "ldit.pipeline.load", "load": "ldit.pipeline.load", "TextCondition": "ldit.nn.conditioning"}


def __getattr__(name: str) -> Any:
    """Public names are imported at first use, so that `ldit --help` needs no torch."""
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'ldit' has no attribute {name!r}")
