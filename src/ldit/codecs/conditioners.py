"""Conditioners: turn labels or texts into what the network is given, with a null one and dropout."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldit.codecs.text import check_text_encoder
from ldit.codecs.text_features import TextFeatures, stacked
from ldit.config.labels import resolve_labels
from ldit.config.model import TextModelConfig
from ldit.config.spec import ModelSpec, TextConditionerConfig
from ldit.errors import RequestError
from ldit.nn.conditioning import TextCondition

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

    def encode(self, labels: Sequence[int] | Tensor, device: torch.device | None = None) -> Tensor:
        """What the network is given: (B,) int64."""
        if isinstance(labels, Tensor):
            return labels.pin_memory().to(device, non_blocking=True) if device and device.type == "cuda" else labels
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


@dataclass(frozen=True)
class TextConditioner:
    """Texts. A label is the number of a text, and the null label that of `null_text`.

    `features` gives the features of texts; None where the encoder is not open, and nothing can be encoded.
    `length`: number of tokens to which every batch is padded; None = that of its longest text. `encoder`: fingerprint
    of the encoder, where it is known.
    """

    texts: Sequence[str]
    null_text: str
    dropout: float = 0.0
    features: TextFeatures | None = field(default=None, repr=False, compare=False)
    length: int | None = None
    encoder: str = ""
    has_null: bool = True
    is_unconditional = False

    @property
    def count(self) -> int:
        return len(self.texts)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.texts)

    @property
    def null(self) -> int | None:
        """The label of the null text; None for a model that was not trained on it."""
        return len(self.texts) if self.has_null else None

    def encode(self, labels: Sequence[int] | Tensor, device: torch.device | None = None) -> TextCondition:
        """What the network is given: features and mask of B texts."""
        numbers = labels.tolist() if isinstance(labels, Tensor) else labels
        texts = [self.null_text if number == self.null else self.texts[number] for number in numbers]
        return self.encode_texts(texts, device)

    def encode_texts(self, texts: Sequence[str], device: torch.device | None = None) -> TextCondition:
        """The same for texts that need not be among those of this conditioner."""
        assert self.features is not None, "the text encoder is not open"
        return stacked(self.features(texts), self.length, device)

    def encode_null(self, count: int, device: torch.device | None = None) -> TextCondition | None:
        """The null text `count` times, as `encode` gives it; None where there is none."""
        return None if self.null is None else self.encode([self.null] * count, device)

    def drop(self, labels: Tensor, u: Tensor) -> Tensor:
        """Labels (B,) with the null label where u (B,), uniform in [0, 1), is below `dropout`."""
        return labels if self.null is None else torch.where(u < self.dropout, self.null, labels)

    def name_of(self, label: int) -> str:
        """The text."""
        return self.texts[label]


Conditioner = ClassConditioner | TextConditioner


def build_conditioner(spec: ModelSpec, texts: Sequence[str] = (), null_text: str | None = None) -> Conditioner:
    """The conditioner of a model; of a text model that of `texts`, with `null_text` or its own null text."""
    model = spec.model
    if isinstance(model, TextModelConfig):
        own = text_config(spec)
        return TextConditioner(texts, own.null if null_text is None else null_text, has_null=own.has_null)
    return ClassConditioner(model.num_classes, spec.class_names, model.null_class, model.class_dropout_prob)


def text_config(spec: ModelSpec) -> TextConditionerConfig:
    """The text encoder of a text model; RequestError where the checkpoint does not say which it is."""
    if isinstance(spec.conditioner, TextConditionerConfig):
        return spec.conditioner
    raise RequestError("conditioner: this text model does not say what its text encoder is")


def check_conditioner(spec: ModelSpec, roots: Sequence[Path] = ()) -> None:
    """CodecError when the encoder of a text model is missing or has another width; reads no weights."""
    if isinstance(spec.model, TextModelConfig):
        check_text_encoder(text_config(spec), spec.model.cap_feat_dim, roots)
