"""Runs work in batches that fit into memory: a batch that does not is repeated with half its rows."""

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from ldit.errors import RequestError

Item = TypeVar("Item")
_WORDS = ("out of memory", "not enough memory", "can't allocate memory", "alloc_failed")


def out_of_memory(error: BaseException) -> bool:
    """Whether the host or the device is out of memory. Most of torch raises a RuntimeError, known by its text alone."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _WORDS)


def in_batches(
    count: int,
    size: int,
    run: Callable[[range], Iterator[Item]],
    halved: Callable[[int, int], None],
    advice: str,
    smallest: int = 1,
    release: Callable[[], bool] = lambda: False,
) -> Iterator[Item]:
    """Yield all of `run(rows)` for rows 0 … count-1, at most `size` rows at a time.

    When memory runs out, `halved(new size, rows left)` is called, and the batch starts again with half its rows; later
    batches keep the new size. Repeated items replace those that `run` yielded before the error, so `run` must yield
    nothing final before its last allocation. Batches have at least `smallest` rows: if these do not fit, RequestError
    with `advice`, which says what to do.

    `release()` frees memory that is held only for speed, and returns whether there was any. If so, a smallest batch is
    tried once more, so `release` must return False in the end.
    """
    first = 0
    while first < count:
        rows = range(first, min(first + size, count))
        try:
            yield from run(rows)
        except Exception as error:
            if not out_of_memory(error):
                raise
            # Free what can be spared; a batch that cannot be halved has no other chance.
            if not release() and len(rows) <= smallest:
                number = "one image" if len(rows) == 1 else f"{len(rows)} images that cannot be split"
                raise RequestError(f"memory does not suffice for {number}: {advice}") from error
            smaller = max(len(rows) // 2, smallest)
        else:
            first = rows.stop
            continue
        # Outside the except block the frames of the failed batch are gone, and with them its tensors.
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        if smaller < len(rows):
            halved(smaller, count - first)
        size = smaller
