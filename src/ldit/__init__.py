"""ldit: diffusion transformers. The verbs of the shell as functions: load, train, evaluate, encode; see README.md."""

from typing import TYPE_CHECKING, Any

from ldit.version import __version__

if TYPE_CHECKING:
    from ldit.commands.encode import encode
    from ldit.commands.evaluate import evaluate
    from ldit.commands.train import train
    from ldit.config.experiment import Experiment
    from ldit.nn.conditioning import TextCondition
    from ldit.pipeline.load import Pipeline, load

__all__ = [
    "Experiment", "Pipeline", "TextCondition", "__version__", "encode", "evaluate", "load", "train",
]  # fmt: skip

_HOMES = {
    "Experiment": "ldit.config.experiment",
    "Pipeline": "ldit.pipeline.load",
    "TextCondition": "ldit.nn.conditioning",
    "encode": "ldit.commands.encode",
    "evaluate": "ldit.commands.evaluate",
    "load": "ldit.pipeline.load",
    "train": "ldit.commands.train",
}


def __getattr__(name: str) -> Any:
    """Public names are imported at first use, so that `ldit --help` needs no torch."""
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'ldit' has no attribute {name!r}")
