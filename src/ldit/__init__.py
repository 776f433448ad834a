"""ldit: diffusion transformers. The verbs of the shell as functions: load, train, evaluate, encode; see README.md."""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ldit.version import __version__

if TYPE_CHECKING:
    from ldit.commands.encode import encode
    from ldit.commands.evaluate import evaluate
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


class _Package(ModuleType):
    """The package `ldit.train` and the function `ldit.train(…)` share a name, and importing a package sets it as an
    attribute of its parent. Here the attribute is always the function; `import` statements find the package still."""

    @property
    def train(self) -> Any:
        return __getattr__("train")

    @train.setter
    def train(self, package: ModuleType) -> None:
        pass


sys.modules[__name__].__class__ = _Package
