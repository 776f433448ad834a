"""A small cache of position tables."""

from collections.abc import Callable, Hashable

from torch import Tensor


class TableCache:
    """The last `most` tables, by a key of all they depend on.

    It has no lock, so that a network that holds it can be copied. Two threads that ask for the same new table at once
    both compute it.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._tables: dict[Hashable, Tensor] = {}

    def get(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """The table of `key`; `make()` computes it if it is not cached, and the oldest one is dropped for it."""
        table = self._tables.get(key)
        if table is None:
            table = make()
            for oldest in list(self._tables)[: max(0, len(self._tables) + 1 - self.most)]:
                self._tables.pop(oldest, None)
            self._tables[key] = table
        return table

    def __len__(self) -> int:
        return len(self._tables)
