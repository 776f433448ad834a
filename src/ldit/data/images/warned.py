"""Pillow's warnings with the name of the image: "Truncated File Read" alone says nothing about a million files."""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ldit.log import logger

_lock, _now = threading.Lock(), threading.local()
_shown: Any = None  # what showed warnings before ours


@contextmanager
def warnings_named(name: str) -> Iterator[None]:
    """Within the block this thread's warnings of Pillow are logged with the image's name. Python's own filters decide
    which are shown: by default each message once."""
    global _shown
    with _lock:
        if warnings.showwarning is not _show:
            _shown, warnings.showwarning = warnings.showwarning, _show
    before, _now.name = getattr(_now, "name", ""), name
    try:
        yield
    finally:
        _now.name = before


def _show(message: Any, category: type[Warning], filename: str, *rest: Any, **more: Any) -> None:
    if name := getattr(_now, "name", ""):
        logger.warning("%s: %s", name, " ".join(str(message).split()))
    else:
        _shown(message, category, filename, *rest, **more)
