"""A user-defined data set: an object that is read like any other set of images."""

import hashlib
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ldit.data.captions import Captions, CaptionTable, checked
from ldit.data.formats.names import check_class_names
from ldit.data.images.decoding import Decoding, to_rgb
from ldit.data.images.image_set import ImageSet
from ldit.data.images.limits import BadImage, check_size
from ldit.data.images.transforms import center_crop
from ldit.errors import DataError, LditError
from ldit.log import logger


class UserData(Protocol):
    """What `ldit.train(config, out, data=…)` takes."""

    @property
    def names(self) -> Sequence[str]:
        """Class names by index; empty for a set without classes."""
        ...

    def __len__(self) -> int: ...

    def fingerprint(self) -> str:
        """Any text that identifies this set and its order: a run can be resumed with the same set only."""
        ...

    def read(self, index: int) -> tuple[Image.Image | np.ndarray, int | None]:
        """(image, label) of sample `index`: a PIL image of any mode or uint8 (H, W, 3), and its class; None without
        classes, for text models its caption or a list of captions. Called from several threads at once. A sample for
        which it raises an exception is a bad image (`data.bad`)."""
        ...


def open_user_set(data: Any, size: int, decoding: Decoding = Decoding()) -> ImageSet:  # noqa: B008
    """`data` as a set that the loader reads, images cut to `size`; DataError names what the object lacks."""
    return UserSet(data, size, decoding)


class UserSet(ImageSet):
    """The images of `data`, cut to `size` x `size` by ADM's centre crop.

    Images become RGB as those of files do, but no EXIF orientation is applied. DataError in one line names the part of
    the object that is missing or wrong; the first sample is read as a check.
    """

    cache = None

    def __init__(self, data: UserData, size: int, decoding: Decoding = Decoding()) -> None:  # noqa: B008
        if isinstance(data, type):
            raise DataError(f"data: give an object, {data.__name__}(), not the class {data.__name__}")
        # Check that every part is there before any is used.
        self._title = type(data).__name__
        for part in ("__len__", "names", "fingerprint", "read"):
            if not hasattr(data, part):
                raise DataError(f"data: {self._title} has no {part}; a data set has __len__, names, fingerprint, read")
        # Then the values: length, names, fingerprint and one sample.
        self.root, self.size = Path(self._title), size
        self._data, self._decoding = data, decoding
        self.num_before_cap = len(data)
        if self.num_before_cap < 1:
            raise DataError(f"data: {self._title} holds no images (its length is {self.num_before_cap})")
        self.names = self._checked_names()
        self._fingerprint = self._checked_fingerprint()
        self._check_first()

    def __len__(self) -> int:
        return self.num_before_cap

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """(size, size, 3) uint8 and its class; DataError names a sample that cannot be read or is not one."""
        try:
            sample = self._data.read(index)
        except (LditError, MemoryError):
            raise
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise DataError(f"{self._name(index)} cannot be read: {reason}") from error
        return self._taken(index, sample)

    def where(self, index: int) -> str:
        return f"sample {index}"

    def fingerprint(self) -> str:
        """sha256 of the object's own fingerprint."""
        return self._fingerprint

    def captions(self) -> Captions:
        """Of the object's `captions`, a sequence with a text or a list of texts for each sample; without one of the
        labels, for which every sample is read."""
        given = getattr(self._data, "captions", None)
        if given is None:
            logger.info("data: reads all samples of %s for their captions (`captions` would list them)", self._title)
            given = [self._data.read(index)[1] for index in range(len(self))]
        if len(given) != len(self):
            raise DataError(f"data: {self._title} has {len(given)} captions for {len(self)} samples")
        table = CaptionTable()
        for index in range(len(self)):
            try:
                table.add(checked(given[index]))
            except ValueError as error:
                raise DataError(f"{self._name(index)}: {error}") from None
        return table.finish()

    def _taken(self, index: int, sample: Any) -> tuple[np.ndarray, int]:
        """(image, class) of what `read` returned, checked and cut."""
        if not isinstance(sample, (tuple, list)) or len(sample) != 2:
            raise DataError(f"{self._name(index)} must be (image, label), got {type(sample).__name__}")
        image, label = self._image(index, sample[0]), self._label(index, sample[1])
        try:
            check_size(*image.size, self._decoding.max_pixels)
            return np.asarray(center_crop(to_rgb(image, self._decoding.background), self.size)), label
        except (BadImage, OSError, ValueError, SyntaxError) as error:  # Pillow decodes the image only here
            raise DataError(f"{self._name(index)} cannot be read: {error}") from None

    def _image(self, index: int, image: Any) -> Image.Image:
        """The image of a sample; DataError when it is of another type."""
        if isinstance(image, Image.Image):
            return image
        if not isinstance(image, np.ndarray):
            what = type(image).__name__
        elif image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size:
            return Image.fromarray(np.ascontiguousarray(image))
        else:
            what = f"array of {image.dtype} {image.shape}"
        raise DataError(f"{self._name(index)}: its image must be a PIL image or uint8 (H, W, 3), got {what}")

    def _label(self, index: int, label: Any) -> int:
        """The class of a sample; DataError when it is none."""
        count = len(self.names)
        if not count and (label is None or isinstance(label, (str, list))):  # captions have no classes
            return 0
        try:
            number = operator.index(label)
        except TypeError:
            number = -1
        if not 0 <= number < count:
            expected = f"an int below {count}, the length of names" if count else "None, because names is empty"
            raise DataError(f"{self._name(index)}: its label must be {expected}, got {label!r:.80}")
        return number

    def _name(self, index: int) -> str:
        return f"data: {self._title} {self.where(index)}"

    def _checked_names(self) -> tuple[str, ...]:
        names = tuple(self._data.names)
        if isinstance(self._data.names, str) or not all(isinstance(name, str) and name.strip() for name in names):
            raise DataError(f"data: {self._title}.names is {self._data.names!r:.80}, not a tuple of class names")
        if len(set(names)) < len(names):
            raise DataError(f"data: {self._title}.names has the same name twice")
        check_class_names(Path(f"{self._title}.names"), names)
        return names

    def _checked_fingerprint(self) -> str:
        text = self._data.fingerprint()
        if not isinstance(text, str) or not text:
            raise DataError(f"data: {self._title}.fingerprint() returned {text!r:.80}, not a text")
        return hashlib.sha256(text.encode()).hexdigest()

    def _check_first(self) -> None:
        """Check the types of the first sample before a run begins. Errors raised by `read` are left to `data.bad`."""
        try:
            sample = self._data.read(0)
        except Exception:
            return
        self._taken(0, sample)
