"""Lists of content hashes in the format of `sha256sum`: 64 hex digits, two spaces, a path below the folder.

A path with a backslash or a line break is escaped and its line begins with a backslash, as `sha256sum` does it.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from ldit.errors import DataError

_LINE = re.compile(rb"(\\?)([0-9a-fA-F]{64}) [ *](.+)", re.DOTALL)
_ESCAPES = {b"\\\\": b"\\", b"\\n": b"\n", b"\\r": b"\r"}


def encode(digests: Mapping[str, bytes]) -> bytes:
    """The list of path -> sha256, in byte order of the paths."""
    lines = []
    for name in sorted(map(os.fsencode, digests)):
        escaped = name
        for short, plain in _ESCAPES.items():  # the backslash itself is first
            escaped = escaped.replace(plain, short)
        mark = b"\\" if escaped != name else b""
        lines.append(mark + digests[os.fsdecode(name)].hex().encode() + b"  " + escaped + b"\n")
    return b"".join(lines)


def read(path: Path) -> dict[str, bytes]:
    """path -> sha256 of a list; DataError names the line that is none, or that leads out of the folder."""
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    found: dict[str, bytes] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line.removesuffix(b"\r"))  # Windows' line end; a name's own is escaped
        if match is None:
            raise DataError(f"{path} line {number}: expected 64 hex digits, two spaces and a path, as of sha256sum")
        raw = match[3]
        if match[1]:
            raw = re.sub(rb"\\[\\nr]", lambda escape: _ESCAPES[escape[0]], raw)
        name = PurePosixPath(os.fsdecode(raw))
        if name.is_absolute() or ".." in name.parts:
            raise DataError(f"{path} line {number}: {name} is not below the folder")
        found[name.as_posix()] = bytes.fromhex(match[2].decode())
    return found
