"""Imports large libraries without the optional packages that they would load along."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def absent(package: str) -> Iterator[None]:
    """Imports within the block go as if `package` were not installed, unless it is loaded already.

    A library that asks once, at its import, does without it from then on.
    """
    hidden = package not in sys.modules
    if hidden:
        sys.modules[package] = None  # type: ignore[assignment]  # documented: the import system takes it for missing
    try:
        yield
    finally:
        if hidden:
            del sys.modules[package]
