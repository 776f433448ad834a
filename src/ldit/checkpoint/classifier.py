"""Opens classifiers trained by ldit."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from ldit.checkpoint.export import read_any_spec, read_weights, verify_export, weight_files
from ldit.checkpoint.run import holds, open_step
from ldit.config.classifier import CLASSIFIER, ClassifierSpec
from ldit.errors import SourceError
from ldit.storage.tensors import NamedTensors


@dataclass(frozen=True)
class ClassifierSource:
    """A committed step of a classifier's run, whose EMA weights match the manifest."""

    path: Path
    spec: ClassifierSpec

    def tensors(self) -> NamedTensors:
        """Named EMA tensors, memory-mapped, one by one."""
        return read_weights(self.path, ema=True)

    def fingerprint(self) -> str:
        """Hex sha256 of the weight files' contents, in order."""
        digest = hashlib.sha256()
        for name in weight_files(self.path, ema=True):
            digest.update((self.path / name).read_bytes())
        return digest.hexdigest()


def holds_classifier(path: Path) -> bool:
    """Whether `path` is a run that trains a classifier, or a step of one."""
    return holds(path, CLASSIFIER)


def open_classifier_step(path: Path) -> ClassifierSource:
    """The latest valid step of a run, or the given step; SourceError when it is damaged or not a classifier."""
    return open_step(path, _opened)


def _opened(folder: Path) -> ClassifierSource:
    verify_export(folder, ema=True)
    spec = read_any_spec(folder)
    if not isinstance(spec, ClassifierSpec):
        raise SourceError(f"{folder} is not a classifier")
    return ClassifierSource(folder, spec)
