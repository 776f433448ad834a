"""ldit: diffusion transformers. `ldit.load(source)` opens a model; see README.md."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldit.flows.pipeline import Pipeline, load
    from ldit.nn.conditioning import TextCondition

__version__ = "0.1.0"
__all__ = ["Pipeline", "TextCondition", "__version__", "load"]

_HOMES = {"Pipeline": "ldit.flows.pipeline", "load": "ldit.flows.pipeline", "TextCondition": "ldit.nn.conditioning"}


def __getattr__(name: str) -> Any:
    """Public names are imported at first use, so that `ldit --help` needs no torch."""
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'ldit' has no attribute {name!r}")
