"""Imports large libraries without their optional packages."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def absent(package: str) -> Iterator[None]:
    """Within the block `package` looks as if it were not installed, unless it is already loaded.

    A library that checks for it once, at import, does not use it afterwards either.
    """
    hidden = package not in sys.modules
    if hidden:
        sys.modules[package] = None  # type: ignore[assignment]  # documented: None makes an import fail
    try:
        yield
    finally:
        if hidden:
            del sys.modules[package]
