"""Work on a thread beside training, one piece at a time."""

import threading
from collections.abc import Callable


class Background:
    """Runs one piece of work at a time on a thread. `failed` tells whether it raised; `wait` raises its error."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def failed(self) -> bool:
        return self._error is not None

    def start(self, work: Callable[[], object]) -> None:
        """Wait for the work before, then run `work` on the thread."""
        self.wait()

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run, name=self.name, daemon=True)
        self._thread.start()

    def settle(self) -> None:
        """Wait until no work is being done, without raising its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def wait(self) -> None:
        """Wait until no work is being done; raises the error of the last, once."""
        self.settle()
        error, self._error = self._error, None
        if error is not None:
            raise error
