"""The files of a plain tar archive: the standard library finds them, `os.pread` reads them; nothing is extracted.

Archives are not trusted. DataError refuses members that are neither files nor folders, names that lead out of the
folder, sizes that exceed the archive, and bytes that are no archive, in one line that names archive and member. Memory:
one header. The standard library stops without an error at a damaged header, so the end of the archive is checked here.
"""

import io
import os
import stat
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ldit.data.images.limits import no_file
from ldit.errors import DataError, LditError, RunError
from ldit.storage.strange import strange

MOST_NAME = 4096  # bytes of a member's name
MOST_EXTENDED = 1 << 20  # bytes of a pax header or a long name
_TAIL = 64 * tarfile.BLOCKSIZE  # bytes after the end mark that must be zero: an archive joined to it begins there
_KINDS = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a character device",
    tarfile.BLKTYPE: "a block device",
    tarfile.FIFOTYPE: "a FIFO",
}
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\3\4": "zip"}
NEEDS_PLAIN = "random access needs a plain tar (unpack it once)"


class Member(NamedTuple):
    """A file of an archive: its name without "." and doubled slashes, offset and size in bytes."""

    name: bytes
    offset: int
    size: int


class Archive:
    """A regular file that is read by offset, from any thread, and closed with its last reference. DataError when there
    is no such file, RunError when the machine cannot open it for now."""

    fd = -1

    def __init__(self, path: Path) -> None:
        try:
            # Without O_NONBLOCK, opening a FIFO of that name would wait for a writer.
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            status = os.fstat(self.fd)
        except OSError as error:
            raise (DataError if no_file(error) else RunError)(f"cannot open {path}: {error.strerror}") from None
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{path} is not a file")
        self.path, self.size = path, status.st_size
        self.version = (status.st_size, status.st_mtime_ns)
        """Size and time, which differ for a later file of the same name."""

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes at `offset`, fewer where the file ends before."""
        try:
            data = os.pread(self.fd, size, offset)
            while 0 < len(data) < size and (more := os.pread(self.fd, size - len(data), offset + len(data))):
                data += more
        except OSError as error:
            raise RunError(f"cannot read {self.path}: {error.strerror}") from None
        return data

    def refusal(self, name: bytes, reason: str) -> DataError:
        """The error for a member."""
        return DataError(f"{self.path}: member {name[:MOST_NAME].decode(errors='backslashreplace')!r} {reason}")


class _Headers(io.BufferedReader):
    """The archive as `tarfile` reads it. DataError for a read longer than any extended header: a damaged size would
    fill the memory."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= MOST_EXTENDED:
            raise DataError(f"an extended header of {size} bytes; they go to {MOST_EXTENDED}")
        return super().read(size)


def members(archive: Archive) -> Iterator[Member]:
    """The files of an archive in order; DataError says what is wrong with it."""
    # Refuse what is certainly no plain tar.
    path = archive.path
    if not archive.size:
        raise DataError(f"{path} is empty")
    start = archive.read(0, 1024)
    if packed := next((name for magic, name in _PACKED.items() if start.startswith(magic)), None):
        raise DataError(f"{path} is packed ({packed}): {NEEDS_PLAIN}")
    if start.strip(b"\0") and (why := strange(start)):
        raise DataError(f"{path} {why}")
    # Walk over the headers with a file object of its own, because a file object has a position.
    raw: BinaryIO = _Headers(io.FileIO(archive.fd, closefd=False))
    raw.seek(0)
    try:
        tar = tarfile.TarFile(fileobj=raw, encoding="utf-8", errors="surrogateescape")
        while (info := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps all of them otherwise
            yield from _file(archive, info, tar.pax_headers)
    except LditError as error:
        raise error if str(path) in str(error) else DataError(f"{path}: {error}") from None
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:  # tarfile.ReadError, and what damaged numbers and texts raise in it
        raise DataError(f"{path}: no tar header: damaged, truncated, or not a tar archive ({error})") from None
    _check_end(archive, tar.offset)


def _file(archive: Archive, info: tarfile.TarInfo, common: Mapping[str, str]) -> Iterator[Member]:
    """The file whose header was read; nothing for a folder. `common`: keys that global headers set for all members."""
    # Refuse names, kinds and sizes that cannot be trusted.
    name = info.name.encode("utf-8", "surrogateescape")
    parts = [part for part in name.split(b"/") if part not in (b"", b".")]
    if name.startswith(b"/") or b".." in parts or b"\0" in name or len(name) > MOST_NAME:
        raise archive.refusal(name, "has a name that is absolute, too long, or has .. or a zero byte")
    if info.issparse() or any(key.startswith("GNU.sparse") for key in info.pax_headers):
        raise archive.refusal(name, "is a sparse file")
    if not info.isreg() and not info.isdir():
        raise archive.refusal(name, f"is {_KINDS.get(info.type, f'of the unknown kind {info.type!r}')}")
    if clash := common.keys() & {"path", "size", "linkpath"}:
        raise archive.refusal(name, f"comes after a global header that sets {min(clash)} of all members")
    left = archive.size - info.offset_data
    if not 0 <= info.size <= left:
        raise archive.refusal(name, f"claims {info.size} bytes, but the archive ends {left} later")
    if info.isreg():
        if not parts:
            raise archive.refusal(name, "has no name")
        yield Member(b"/".join(parts), info.offset_data, info.size)


def _check_end(archive: Archive, at: int) -> None:
    """DataError unless the archive ends with zeros at `at`, where `tarfile` found no further header."""
    tail = archive.read(at, _TAIL)
    if len(tail) < tarfile.BLOCKSIZE:
        raise DataError(f"{archive.path} ends at byte {archive.size} without an end mark: it is truncated")
    if tail[: tarfile.BLOCKSIZE].strip(b"\0"):
        raise DataError(f"{archive.path}: no tar header at byte {at}: damaged, or not a tar archive")
    if tail.strip(b"\0"):
        raise DataError(f"{archive.path} continues after its end mark at byte {at}: several archives joined?")
