"""Writes a set of images as a shared job (`ldit.storage.shared_job`): the common part, and sets that are folders.

samples.json describes the set (`ldit.pipeline.sets.job`), and states in the end that it is complete.
"""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ldit.codecs.pixels import to_pil
from ldit.errors import RequestError
from ldit.pipeline.sets.job import ENDING, Labels, check_format, ended
from ldit.storage.atomic import fsync, write_json
from ldit.storage.shared_job import SharedJob, cut

JOB = "samples.json"
CRC = "arr_0_crc32"  # key of FILE.npz.json: the checksum of its archive's images
_TEXT = "ldit"  # the PNG chunk with the settings


class Block(NamedTuple):
    """Consecutive images of a set, sampled together: uint8 (B, 3, H, W) on the CPU. `rows` are their numbers."""

    rows: range
    images: Tensor
    labels: tuple[int, ...]


class SetFiles(SharedJob[Block]):
    """A set with this `description`, made at `out`, by way of files in `place`."""

    # Names of sources, which differ between machines; what follows from the weights; what is known only in the end.
    ignored = ("source", "guide.source", "class_names", "training", *ENDING, CRC)

    def __init__(self, out: Path, place: Path, description: dict[str, Any], labels: Labels) -> None:
        super().__init__(out, place, JOB, description, cut(description["num"], description["batch_size"]))
        self.labels = labels
        self.height, self.width = description["size"]

    def bytes_needed(self, items: int) -> int:
        return items * self.height * self.width * 3

    def _is_own(self, name: str) -> bool:
        """Whether a file of that name in `place` may belong to this set."""
        raise NotImplementedError

    def _read_description(self) -> Any:
        return read_description(self.description_file)

    def _write_description(self, path: Path) -> None:
        write_json(path, self.description)

    def _check_same(self, begun: Any) -> None:
        check_format(self.out, begun)
        super()._check_same(begun)

    def _check_begun(self, begun: Any) -> None:
        super()._check_begun(begun)
        # The folder may hold nothing but files of this set, so that no other files are touched.
        for name in sorted(os.listdir(self.place)):
            if not name.startswith(".") and (begun is None or not self._is_own(name)):
                raise RequestError(f"--out {self.out}: holds {name}, which is not of this set; choose another name")

    def _adopt(self, begun: Any) -> None:
        """Keep the names with which it was begun. A complete set that lost an image is not complete any more."""
        self.description = {**{key: value for key, value in begun.items() if key not in ENDING}, "complete": False}


class FolderWriter(SetFiles):
    """Writes DIR/000000.png …, each with its settings in its metadata, and DIR/samples.json."""

    def __init__(self, out: Path, description: dict[str, Any], labels: Labels) -> None:
        super().__init__(out, out, description, labels)

    def path(self, index: int) -> Path:
        return self.out / f"{index:0{_digits(self.description['num'])}d}.png"

    def is_complete(self) -> bool:
        begun = self._read_description()
        if begun is None:
            return False
        self._check_same(begun)
        return begun.get("complete") is True and all(map(self.has_block, range(len(self.blocks))))

    def has_block(self, number: int) -> bool:
        return all(_is_filled(self.path(index)) for index in self.blocks[number])

    def count_done(self) -> int:
        return sum(name.endswith(".png") for name in os.listdir(self.out))

    def _is_own(self, name: str) -> bool:
        return name == JOB or is_image_of(name, self.description["num"])

    def _write(self, number: int, block: Block) -> None:
        # Write all images of the block to the disk before the first is renamed into place.
        pairs = list(zip(block.rows, to_pil(block.images), strict=True))
        for (index, image), label in zip(pairs, block.labels, strict=True):
            half = self._half(self.path(index).name)
            image.save(half, pnginfo=self._settings(index, label))
            fsync(half)
        for index, _ in pairs:
            os.replace(self._half(self.path(index).name), self.path(index))
        fsync(self.out)

    def _settings(self, index: int, label: int) -> PngInfo:
        """The metadata of an image."""
        description = self.description
        settings = {name: description[name] for name in ("source", "sampling", "dtype", "ema", "training")}
        settings |= {"seed": description["seed"] + index, **({} if self.labels.rule is None else {"label": label})}
        settings |= {} if description["guide"] is None else {"guide": description["guide"]["source"]}
        info = PngInfo()
        info.add_text(_TEXT, json.dumps(settings))
        return info

    def _complete(self) -> bool:
        if not all(map(self.has_block, range(len(self.blocks)))):
            return False
        self._put(self.description_file, lambda path: write_json(path, ended(self.description, self.labels)))
        return True

    def _sweep(self, has_locks: bool) -> None:
        if has_locks:
            self._remove_dead()


def is_image_of(name: str, num: int) -> bool:
    """Whether a file has the name of an image in a folder of `num` images."""
    stem = name.removesuffix(".png")
    return stem != name and stem.isdecimal() and len(stem) == _digits(num) and int(stem) < num


def _digits(num: int) -> int:
    """The number of digits in an image's name."""
    return max(6, len(str(num - 1)))


def read_description(path: Path) -> Any:
    """The content of a samples.json; None if there is none. RequestError when it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(f"{path} is damaged: {error}; remove the set and start again") from None


def _is_filled(path: Path) -> bool:
    """Whether an image exists. Images are written atomically, but after a power failure a file system may leave an
    empty file."""
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:
        return False
