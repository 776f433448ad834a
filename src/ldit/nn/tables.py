"""Tables of positions that were made, kept for the calls that follow."""

from collections.abc import Callable, Hashable

from torch import Tensor


class Tables:
    """The last `most` tables by what they depend on. Without a lock, so that a network that holds one can be copied:
    threads that ask for the same at once both make it."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._made: dict[Hashable, Tensor] = {}

    def get(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """The table of `key`, which is `make()` where it was not made yet; the oldest one goes for it."""
        found = self._made.get(key)
        if found is None:
            found = make()
            for old in list(self._made)[: max(0, len(self._made) + 1 - self.most)]:
                self._made.pop(old, None)
            self._made[key] = found
        return found

    def __len__(self) -> int:
        return len(self._made)
