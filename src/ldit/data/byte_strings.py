"""Many byte strings in one buffer."""

from array import array
from collections.abc import Iterable

import numpy as np


class ByteStrings:
    """Many byte strings in one buffer, with 8 bytes of overhead each."""

    def __init__(self, strings: Iterable[bytes] = ()) -> None:
        self._all, self._ends = bytearray(), array("q")
        for string in strings:
            self.append(string)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> bytes:
        return bytes(self._all[self._ends[index - 1] if index else 0 : self._ends[index]])

    def append(self, string: bytes) -> None:
        self._all += string
        self._ends.append(len(self._all))

    def arrays(self) -> dict[str, np.ndarray]:
        """The strings as "text" and "ends", for a file."""
        return {"text": np.frombuffer(self._all, np.uint8), "ends": np.frombuffer(self._ends, np.int64)}

    @classmethod
    def of(cls, text: np.ndarray, ends: np.ndarray) -> "ByteStrings":
        """The strings that `arrays` wrote."""
        strings = cls()
        strings._all += text.tobytes()
        strings._ends.frombytes(ends.astype(np.int64).tobytes())
        return strings
