"""Captions of a set of images: one or several texts an image, with weights; equal texts are stored once."""

import hashlib
from array import array
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch

from ldit.data.byte_strings import ByteStrings
from ldit.errors import DataError, SourceError
from ldit.storage.tensors import read_safetensors, write_safetensors

FILE = "captions.safetensors"
MOST_CHARACTERS = 1 << 16
"""Longest caption: no encoder reads as much."""
Caption = tuple[str, float]
"""A text and its weight."""


class Texts(Sequence[str]):
    """Texts by number."""

    def __init__(self, strings: ByteStrings) -> None:
        self.strings = strings

    def __len__(self) -> int:
        return len(self.strings)

    @overload
    def __getitem__(self, number: int) -> str: ...
    @overload
    def __getitem__(self, number: slice) -> list[str]: ...
    def __getitem__(self, number: int | slice) -> str | list[str]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        if not 0 <= number < len(self):
            raise IndexError(f"text {number} of {len(self)}")
        return self.strings[number].decode()


class Captions:
    """The captions of N images. Texts are numbered in the order in which they first occur.

    Image i has the texts `numbers[starts[i]:starts[i + 1]]`, whose weights, summed up to each, are in `sums`.
    """

    def __init__(self, texts: ByteStrings, starts: np.ndarray, numbers: np.ndarray, sums: np.ndarray) -> None:
        self.texts, self.starts, self.numbers, self.sums = Texts(texts), starts, numbers, sums

    def __len__(self) -> int:
        return len(self.starts) - 1

    def draw(self, image: int, u: float) -> int:
        """The number of one of the image's texts, chosen by its weight; u is uniform in [0, 1)."""
        first, last = int(self.starts[image]), int(self.starts[image + 1])
        sums = self.sums[first:last]
        place = int(np.searchsorted(sums, u * float(sums[-1]), side="right"))
        return int(self.numbers[first + min(place, last - first - 1)])

    def main(self, image: int) -> int:
        """The number of the image's text with the largest weight, of equal ones the first."""
        first, last = int(self.starts[image]), int(self.starts[image + 1])
        weights = np.diff(self.sums[first:last], prepend=np.float32(0))
        return int(self.numbers[first + int(weights.argmax())])

    def fingerprint(self) -> str:
        """Hex sha256 of all texts, weights, and which image has which."""
        digest = hashlib.sha256()
        for name, values in sorted(self._arrays().items()):
            digest.update(f"{name}:{len(values)}\n".encode())
            digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        write_safetensors(path, [(name, torch.from_numpy(values.copy())) for name, values in self._arrays().items()])

    def _arrays(self) -> dict[str, np.ndarray]:
        return {**self.texts.strings.arrays(), "starts": self.starts, "numbers": self.numbers, "sums": self.sums}


class CaptionTable:
    """Collects captions image by image; `finish` makes `Captions` of them."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}
        self._texts = ByteStrings()
        self._starts, self._numbers, self._sums = array("q", (0,)), array("i"), array("f")

    def add(self, captions: Sequence[Caption]) -> None:
        """The captions of the next image, at least one, as `checked` returns them."""
        total = 0.0
        for text, weight in captions:
            if text not in self._places:
                self._places[text] = len(self._texts)
                self._texts.append(text.encode())
            total += weight
            self._numbers.append(self._places[text])
            self._sums.append(total)
        self._starts.append(len(self._numbers))

    def finish(self) -> Captions:
        arrays = np.array(self._starts, np.int64), np.array(self._numbers, np.int32), np.array(self._sums, np.float32)
        return Captions(self._texts, *arrays)


def checked(value: Any, weights: Any = None) -> tuple[Caption, ...]:
    """The captions of an image from a text or a list of texts, by default of equal weight; surrounding space is
    removed. ValueError says what is wrong."""
    texts = value if isinstance(value, list) else [value]
    if not texts:
        raise ValueError("its list of captions is empty")
    if weights is None:
        weights = [1.0] * len(texts)
    if not isinstance(weights, list) or len(weights) != len(texts):
        raise ValueError(f"its weights are not {len(texts)} numbers, one a caption")
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not (isfinite(weight) and weight > 0):
            raise ValueError(f"the weight {weight!r:.40} of a caption is not a positive number")
    return tuple((_checked_text(text), float(weight)) for text, weight in zip(texts, weights, strict=True))


def _checked_text(text: Any) -> str:
    if not isinstance(text, str):
        raise ValueError(f"its caption is a {type(text).__name__}, not a text")
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"its caption has {len(text):,} characters, the most are {MOST_CHARACTERS:,}")
    if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError("its caption holds characters that are no text")
    if not (text := text.strip()):
        raise ValueError("its caption is empty")
    return text


def read_captions(path: Path) -> Captions:
    """The captions that `save` wrote; DataError when the file is damaged."""
    try:
        found = {name: tensor.numpy() for name, tensor in read_safetensors(path)}
        texts = ByteStrings.of(found["text"], found["ends"])
        captions = Captions(texts, found["starts"], found["numbers"], found["sums"])
        starts, numbers = captions.starts, captions.numbers
        is_sound = (
            bool((np.diff(starts) > 0).all()) and starts[0] == 0 and starts[-1] == len(numbers) == len(captions.sums)
            and (not len(numbers) or 0 <= numbers.min() <= numbers.max() < len(texts))
        )  # fmt: skip
    except (KeyError, ValueError, IndexError, SourceError) as error:
        raise DataError(f"{path} is damaged: {error}") from None
    if not is_sound:
        raise DataError(f"{path} is damaged: its parts do not fit together")
    return captions
