"""Remembers which large files have been compared with their checksums, so that each is read for that only once.

`verified.json` in the user's cache folder ($XDG_CACHE_HOME/ldit, else ~/.cache/ldit) has, for each file, its size,
times of change, inode and device, and the sha256 that it had then. A file with the same state is taken to have the same
content: the kernel sets the time of a file's last change (ctime), and no program can put it back. Not noticed is what
changes a disk's content without the kernel, such as a failing disk: `ldit info --verify` reads every byte.
"""

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

LEAST = 1 << 24
"""Smaller files are hashed faster than it would pay to remember them (16 MiB: about 10 ms)."""
MOST = 500  # entries; the oldest leave
_SETTLED = 100_000_000  # ns since the last change: a change within the clock's tick would not show in the times
_WRITING = threading.Lock()  # the files of a sharded model are verified in threads


def cache_folder() -> Path:
    """The folder of what can be computed again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ldit"


def state_of(path: Path) -> tuple[int, ...]:
    """What changes whenever the file does: size, times of change, inode, device."""
    stat = path.stat()
    return (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev)


def is_verified(path: Path, state: tuple[int, ...], sha256: str) -> bool:
    """Whether the file had this content when it had this state."""
    return _read().get(str(path.resolve())) == [*state, sha256]


def remember(path: Path, state: tuple[int, ...], sha256: str) -> None:
    """Note that the file had this content in `state`, unless it has changed since. Nothing is noted for small and for
    just changed files, or where the cache folder cannot be written."""
    if state[0] < LEAST or time.time_ns() - max(state[1:3]) < _SETTLED:
        return
    try:
        if state_of(path) != state:
            return
        with _WRITING:
            _write(str(path.resolve()), [*state, sha256])
    except (OSError, RuntimeError):  # RuntimeError: there is no home folder
        return


def _write(key: str, entry: list[Any]) -> None:
    """Add an entry to the file, which is replaced: a reader sees the old entries or the new. Of two processes that
    write at once, one may lose its entry."""
    entries = _read()
    entries.pop(key, None)
    entries[key] = entry
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"verified.json.{os.getpid()}"
    temporary.write_text(json.dumps(dict(list(entries.items())[-MOST:])), encoding="utf-8")
    os.replace(temporary, folder / "verified.json")


def _read() -> dict[str, Any]:
    try:
        entries = json.loads((cache_folder() / "verified.json").read_bytes())
    except (OSError, RuntimeError, ValueError, RecursionError):
        return {}
    return entries if isinstance(entries, dict) else {}
