"""File locks that tell a running process from a dead one: the kernel frees a lock when its holder dies."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Wait for the folder's lock and hold it. Yields whether it is held: False on a file system without locks.
    FileNotFoundError when the folder is missing, or was removed while this process waited."""
    descriptor = _opened(folder)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            held = True
        except OSError:
            held = False
        if not _is_still(folder, descriptor):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
        yield held
    finally:
        os.close(descriptor)


def hold(path: Path) -> int:
    """A file descriptor that holds the lock of a folder or file until it is closed or the process ends. It does not
    wait: the caller has just made the folder or file, so the lock is free."""
    descriptor = _opened(path)
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def held_by_other(path: Path) -> bool:
    """Whether a running process holds the lock of a folder or file. True on a file system without locks, because one
    might."""
    try:
        descriptor = _opened(path)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _opened(path: Path) -> int:
    """A descriptor; files are opened for writing too, because network file systems lock no others."""
    return os.open(path, (os.O_RDONLY | os.O_DIRECTORY if path.is_dir() else os.O_RDWR) | os.O_CLOEXEC)


def _is_still(folder: Path, descriptor: int) -> bool:
    """Whether the path still names the folder that was opened."""
    try:
        return os.path.samestat(os.stat(folder), os.fstat(descriptor))
    except FileNotFoundError:
        return False
