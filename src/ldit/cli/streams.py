"""Standard streams that a command can rely on: open, forgiving, able to show every character."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


@contextmanager
def reliable_streams() -> Iterator[None]:
    """Within the block stdout and stderr exist and show every character, and stderr never fails: messages and progress
    bars are no reason to end the work."""
    _fill_descriptors()
    before = sys.stdout, sys.stderr
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed when the interpreter started
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - open to the end
        elif hasattr(stream, "reconfigure") and stream.errors == "strict":
            stream.reconfigure(errors="replace")  # an ASCII terminal shows ? where it lacks a character
    sys.stderr = _Forgiving(sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        _give_up_unwritten(sys.stderr)


def _give_up_unwritten(stream: Any) -> None:
    """Let go of text that cannot be written: the interpreter would try again at its end, and exit with 120."""
    if stream is None:
        return
    try:
        stream.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
            stream.flush()


def _fill_descriptors() -> None:
    """Open /dev/null at each of the descriptors 0, 1, 2 that is closed: else the next file that is opened would get
    that number, and what libraries print would go into it."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


class _Forgiving:
    """A text stream whose writing never fails: what cannot be written is lost."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return int(self._stream.write(text))
        except (OSError, ValueError):  # a full disk, a reader that is gone, a closed file
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            return

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
