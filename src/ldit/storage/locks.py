"""File locks that tell a running process from a dead one: the kernel frees a lock when its holder dies."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Wait for the folder's lock and hold it; yields False on a file system without locks, where nothing is held.
    FileNotFoundError when the folder is not there, or was removed while this process waited."""
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
    """A descriptor that holds the lock of a folder or file until it is closed or its process ends. Does not wait: the
    caller has just made the folder or file."""
    descriptor = _opened(path)
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def held_by_other(path: Path) -> bool:
    """Whether a living process holds the lock of a folder or file. True on a file system without locks: one may."""
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
    """Files for writing too, without which network file systems lock nothing."""
    return os.open(path, (os.O_RDONLY | os.O_DIRECTORY if path.is_dir() else os.O_RDWR) | os.O_CLOEXEC)


def _is_still(folder: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(folder), os.fstat(descriptor))
    except FileNotFoundError:
        return False
