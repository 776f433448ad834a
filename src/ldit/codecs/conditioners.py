"""Conditioners: turn labels into what the network is given, with a null label and label dropout."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldit.config.labels import resolve_labels
from ldit.config.model import TextModelConfig
from ldit.config.spec import ModelSpec
from ldit.errors import RequestError

Labels = int | str | Iterable[int | str] | Tensor | None
"""Class numbers or names as a user gives them: one, a list, or an array."""


@dataclass(frozen=True)
class ClassConditioner:
    """Class labels. A model without classes (`count` 0) is only given the null label."""

    count: int
    """Number of classes without the null class; 0 = unconditional."""
    names: tuple[str, ...] | None
    """Class names in the order of their labels; None if unknown."""
    null: int | None
    """The label that means "no class", for guidance and label dropout; None if the model has none."""
    dropout: float
    """Probability that training replaces a label by the null label."""

    @property
    def is_unconditional(self) -> bool:
        return self.count == 0

    def resolve(self, given: Labels) -> tuple[int, ...]:
        """Labels from numbers or names; a single one gives a tuple of one. RequestError names what is not a class."""
        if isinstance(given, (str, int)):
            given = [given]
        try:
            listed: Any = given.tolist() if hasattr(given, "tolist") else list(given or ())  # type: ignore[union-attr]
        except TypeError:
            raise RequestError(f"class_labels: expected numbers or names, got {given!r:.80}") from None
        if not isinstance(listed, list):  # an array without dimensions gives a number
            listed = [listed]
        return tuple(index for label in listed for index in resolve_labels(label, self.count, self.names))

    def encode(self, labels: Sequence[int], device: torch.device | None = None) -> Tensor:
        """What the network is given: (B,) int64."""
        return torch.tensor(labels, dtype=torch.int64, device=device)

    def encode_null(self, count: int, device: torch.device | None = None) -> Tensor | None:
        """The null label `count` times, as `encode` gives it; None if the model has none."""
        return None if self.null is None else self.encode([self.null] * count, device)

    def drop(self, labels: Tensor, u: Tensor) -> Tensor:
        """Labels (B,) with the null label where u (B,), uniform in [0, 1), is below `dropout`."""
        return labels if self.null is None else torch.where(u < self.dropout, self.null, labels)

    def name_of(self, label: int) -> str:
        """Caption of a label: its name, "class N" without names, "" for a model without classes."""
        if self.is_unconditional:
            return ""
        return self.names[label] if self.names else f"class {label}"


Conditioner = ClassConditioner


def build_conditioner(spec: ModelSpec) -> Conditioner:
    """The conditioner of a model; RequestError for text models, whose conditioner is not built yet."""
    model = spec.model
    if isinstance(model, TextModelConfig):
        raise RequestError("text-to-image is not built yet: only its network is")
    return ClassConditioner(model.num_classes, spec.class_names, model.null_class, model.class_dropout_prob)
