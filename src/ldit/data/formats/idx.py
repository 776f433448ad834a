"""IDX files, the format of MNIST: grey images and labels, gzipped or plain (LeCun, Cortes & Burges 1998).

A file is a big-endian header (magic 0x0000080N for N axes of bytes, then the axes as uint32) and the bytes themselves.
"""

import gzip
import hashlib
import math
import zlib
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from ldit.data.formats.image_folder import subset
from ldit.data.formats.labels import NAME_FILES, class_names
from ldit.data.formats.recognise import IDX_IMAGES, IDX_LABELS, IDX_TRAIN, idx_spellings
from ldit.data.images.image_set import ImageSet
from ldit.data.images.transforms import center_crop
from ldit.errors import DataError
from ldit.storage.strange import what_is_it

DIGITS = tuple("0123456789")
MOST_BYTES = 1 << 31  # of one file, unpacked: it is held in memory
MOST_SIDE = 4096  # pixels
_CHUNK = 1 << 20


class IdxImages(ImageSet):
    """The images of PART-images-idx3-ubyte with the labels of PART-labels-idx1-ubyte; `part` is train or t10k.

    Grey is repeated to RGB, and images get the same centre crop as all others. Class names are the lines of classes.txt
    or labels.txt beside the files, else the ten digits. `max_per_class` keeps a fixed random subset of each larger
    class. DataError names the file that is missing, damaged, or not as long as its header says.
    """

    def __init__(self, root: Path, size: int, part: str = IDX_TRAIN, max_per_class: int = 0) -> None:
        self.root, self.size, self.part = root, size, part
        # Read both files and the class names; each label must be one of the classes.
        images, labels = _file(root, part, *IDX_IMAGES), _file(root, part, *IDX_LABELS)
        self.names = _names(root)
        self._images, self._labels = read_idx(images, IDX_IMAGES[1]), read_idx(labels, IDX_LABELS[1])
        if len(self._images) != len(self._labels):
            raise DataError(f"{labels} has {len(self._labels)} labels for {len(self._images)} images of {images}")
        if self._labels.max() >= len(self.names):
            at = int((self._labels >= len(self.names)).argmax())
            raise DataError(
                f"{labels}: label {self._labels[at]} of image {at} for {len(self.names)} classes "
                f"(a {NAME_FILES[0]} beside it names them, one a line)"
            )
        # Places in the files of the images that are used, (N,) int32.
        self.num_before_cap = len(self._images)
        self._chosen = np.arange(self.num_before_cap, dtype=np.int32)
        if max_per_class:
            self._chosen = np.array(self._capped(max_per_class), dtype=np.int32)

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """(size, size, 3) uint8 and its class."""
        at = self._chosen[index]
        grey = center_crop(Image.fromarray(self._images[at]), self.size)
        return np.repeat(np.asarray(grey)[:, :, None], 3, axis=2), int(self._labels[at])

    def label(self, index: int) -> int:
        return int(self._labels[self._chosen[index]])

    def where(self, index: int) -> str:
        """The number of the image in its file."""
        return f"{self.part}-images[{self._chosen[index]}]"

    def fingerprint(self) -> str:
        """sha256 of images, labels and which of them are used; packed and unpacked files give the same."""
        digest = hashlib.sha256(repr(self._images.shape).encode())
        for array in (self._images, self._labels, self._chosen.astype("<i4")):
            digest.update(array.data)
        return digest.hexdigest()

    def _capped(self, count: int) -> list[int]:
        """Places in the files of at most `count` images of each class."""
        chosen: list[int] = []
        for label, name in enumerate(self.names):
            places = np.flatnonzero(self._labels == label).tolist()
            kept = subset([f"{place:010d}" for place in places], count, name) if len(places) > count else places
            chosen += map(int, kept)
        return chosen


def read_idx(path: Path, axes: int) -> np.ndarray:
    """The uint8 array of an IDX file with so many axes. Memory follows the size of the file, not that in its header."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            # The header: the magic number, which says bytes and the number of axes, then the length of each axis.
            header = file.read(4 + 4 * axes)
            if header[:4] != bytes((0, 0, 8, axes)):
                start = header[:4].hex() or "nothing"
                why = what_is_it(path) if header and path.suffix != ".gz" else ""
                why = why or f"is not an IDX file of bytes with {axes} axes: it begins with {start}"
                raise DataError(f"{path} {why}")
            if len(header) < 4 + 4 * axes:
                raise DataError(f"{path} ends within its header")
            shape = tuple(int.from_bytes(header[i : i + 4], "big") for i in range(4, len(header), 4))
            # One byte more than expected, to notice a file that is too long.
            expected = _bytes_of(path, shape)
            data = _read(file, expected + 1)
    except (EOFError, OSError, zlib.error) as error:
        why = what_is_it(path)
        raise DataError(f"{path} {why}" if why and "packed" not in why else f"cannot read {path}: {error}") from None
    if len(data) != expected:
        count = f"more than {expected}" if len(data) > expected else str(len(data))
        raise DataError(f"{path} holds {count} bytes after its header, which says {expected} ({_show(shape)})")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _bytes_of(path: Path, shape: tuple[int, ...]) -> int:
    """Bytes of an array of this shape; DataError when a header claims an impossible size."""
    count = math.prod(shape)
    if not 1 <= count <= MOST_BYTES or any(side > MOST_SIDE for side in shape[1:]):
        raise DataError(f"{path}: its header says {_show(shape)}; sides go to {MOST_SIDE}, files to {MOST_BYTES} bytes")
    return count


def _read(file: IO[bytes] | gzip.GzipFile, most: int) -> bytes | bytearray:
    """The rest of the file, up to `most` bytes. It reads until nothing comes, which makes gzip verify its checksum."""
    data = bytearray()
    while len(data) < most and (chunk := file.read(min(_CHUNK, most - len(data)))):
        data += chunk
    return data


def _show(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _file(root: Path, part: str, kind: str, axes: int) -> Path:
    names = idx_spellings(root, part, kind, axes)
    for path in names:
        if path.is_file():
            return path
    raise DataError(f"no {names[0].name}[.gz] in {root}")


def _names(root: Path) -> tuple[str, ...]:
    names_file = class_names(root)
    if names_file is None:
        return DIGITS
    path, names = names_file
    if not 1 <= len(names) <= 256:
        raise DataError(f"{path}: expected 1 to 256 class names, one a line, got {len(names)}")
    return names
