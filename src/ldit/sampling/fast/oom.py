"""Images in batches that fit: where memory runs out, a batch is begun again in halves."""

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from ldit.errors import RequestError

Item = TypeVar("Item")
_WORDS = ("out of memory", "not enough memory", "can't allocate memory", "alloc_failed")


def out_of_memory(error: BaseException) -> bool:
    """Whether memory, of the host or the device, did not suffice. Most of torch says so in words alone."""
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
    """What `run(rows)` yields for rows 0 … count-1, at most `size` of them together.

    When memory runs out, `halved(new size, images still to be made)` is told, and the batch begins again with half
    its rows; the new size stays. `run` must yield nothing final before its last allocation: what it yielded before the
    error is superseded. A batch of no more than `smallest` rows is not halved: RequestError with `advice`, what to do.

    Before, `release()` lets go of memory that is held for speed alone, and says whether there was any: then the
    smallest batch is tried once more. It must say so a finite number of times.
    """
    first = 0
    while first < count:
        rows = range(first, min(first + size, count))
        try:
            yield from run(rows)
        except Exception as error:
            if not out_of_memory(error):
                raise
            if not release() and len(rows) <= smallest:
                number = "one image" if len(rows) == 1 else f"{len(rows)} images that cannot be split"
                raise RequestError(f"memory does not suffice for {number}: {advice}") from error
            smaller = max(len(rows) // 2, smallest)
        else:
            first = rows.stop
            continue
        # Only here are the frames of the failed batch gone, and their tensors with them.
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        if smaller < len(rows):
            halved(smaller, count - first)
        size = smaller
