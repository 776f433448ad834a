"""Every call by which a process changes the disk, counted: at the n-th one the process dies, or the disk refuses.

Files opened for writing get a raw layer of our own under Python's buffers, so that a "write" is what reaches the
kernel, and a death loses what the buffers held, as SIGKILL does."""

import io
import os
import shutil
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

OPERATIONS = ("open", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir")


@dataclass
class Calls:
    """The names of the calls so far. `act(name)` is told each before it happens; it may raise or end the process.
    Where it returns a number, only that share of a write's bytes is written before `act` is asked once more."""

    act: Callable[[int, str], float | None] = lambda number, name: None
    made: list[str] = field(default_factory=list)

    def make(self, name: str) -> float | None:
        self.made.append(name)
        return self.act(len(self.made), name)


class _Raw(io.FileIO):
    """A file whose writes are counted."""

    calls: Calls

    def write(self, data: Any) -> int:
        share = self.calls.make("write")
        if share is not None:
            view = memoryview(data).cast("B")
            super().write(view[: int(len(view) * share)])
            self.calls.act(len(self.calls.made), "half write")
        return super().write(data)


def _opener(calls: Calls, real: Callable[..., Any]) -> Callable[..., Any]:
    def opened(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if not set(mode) & set("wax+"):
            return real(file, mode, *arguments, **options)
        calls.make("open")
        raw = _Raw(file, mode.replace("b", "").replace("t", ""))
        raw.calls = calls
        buffered = io.BufferedWriter(raw)
        encoding = options.get("encoding") or (arguments[1] if len(arguments) > 1 else None)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding=encoding)

    return opened


@contextmanager
def counted(act: Callable[[int, str], float | None] = lambda number, name: None) -> Iterator[Calls]:
    """Count every call made inside, and have each announced to `act`."""
    calls = Calls(act)

    def guard(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            calls.make(name)
            return real(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in OPERATIONS:
            patch.setattr(os, name, guard(name, getattr(os, name)))
        patch.setattr(shutil, "rmtree", guard("rmtree", shutil.rmtree))
        opened = _opener(calls, io.open)
        patch.setattr(io, "open", opened)
        patch.setattr("builtins.open", opened)
        yield calls


def in_child(work: Callable[[], int]) -> int:
    """`work()` in a forked process: its exit status, or minus the signal that ended it; 99 = it raised."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            status = work()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
