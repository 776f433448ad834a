"""Counts of the simulated device: kernels, waits and copies since the last `reset`."""

import ctypes
import os
import tempfile
from collections import Counter
from pathlib import Path

_lib = ctypes.CDLL(os.environ["NULL_LIB"])


def reset() -> None:
    _lib.null_reset()


def read() -> Counter[str]:
    """Name -> number. Kernels begin with "K:", matrix products with "G:", Triton's with "T:", waits with "S:"."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "counts"
        _lib.null_dump(str(file).encode())
        lines = [line.split("\t", 1) for line in file.read_text().splitlines()]
    counts: Counter[str] = Counter()
    for number, name in lines:
        counts[name] += int(number)
    return counts


def launches(counts: Counter[str]) -> int:
    return sum(number for name, number in counts.items() if name.startswith(("K:", "G:", "T:")))


def waits(counts: Counter[str]) -> dict[str, int]:
    return {name[2:]: number for name, number in counts.items() if name.startswith("S:")}
