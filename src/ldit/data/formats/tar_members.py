"""The members of a plain tar archive, found by its headers alone; nothing is ever extracted.

Read are ustar, pax (POSIX.1-2017, "pax", extended header and ustar interchange formats) and GNU long names (GNU tar
manual, "Basic Tar Format"). An archive is not to be trusted: every size is compared with the file before it is used, a
name has no way out of its folder, and what is neither a file nor a folder is refused, each with a line that names
archive and member. Memory: a name, an extended header and a window at a time, whatever the headers claim.
"""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ldit.data.images.limits import no_file
from ldit.errors import DataError, RunError

BLOCK = 512
MOST_NAME = 4096  # bytes of a member's name
MOST_EXTENDED = 1 << 20  # bytes of a pax header
_WINDOW = 8192  # bytes read at once: small members and the next header come together
_TAIL = 64 * BLOCK  # bytes after the end mark that must be zero: an archive glued behind would begin there
_ZERO = bytes(BLOCK)
_KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a FIFO",
    b"K": "a link",
    b"M": "the rest of another volume",
    b"S": "a sparse file",
}
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\3\4": "zip"}
NEEDS_PLAIN = "random access needs a plain tar (unpack it once)"


class Member(NamedTuple):
    """A file of an archive: its name without "." and doubled slashes, and where its bytes are."""

    name: bytes
    offset: int
    size: int


class Archive:
    """A regular file that is read by position, from any thread; it is closed when nobody refers to it any more.
    DataError when there is none, RunError when it cannot be read for now."""

    fd = -1

    def __init__(self, path: Path) -> None:
        try:
            # Without O_NONBLOCK, a FIFO of that name would be waited for.
            self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            status = os.fstat(self.fd)
        except OSError as error:
            raise (DataError if no_file(error) else RunError)(f"cannot open {path}: {error.strerror}") from None
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{path} is not a file")
        self.path, self.size = path, status.st_size
        self.version = (status.st_size, status.st_mtime_ns)
        """Tells the file from a later one of that name."""

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


class Walk:
    """Iterates over the files of an archive in their order; DataError for whatever is wrong with it."""

    def __init__(self, archive: Archive) -> None:
        self.archive = archive
        self._at = 0
        self._held, self._held_at = b"", 0
        self._name: bytes | None = None  # what an extended header says of the next member
        self._size: int | None = None

    def refusal(self, name: bytes, reason: str) -> DataError:
        """The error of a member."""
        return DataError(f"{self.archive.path}: member {name[:MOST_NAME].decode(errors='backslashreplace')!r} {reason}")

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes at `offset`, which are small and mostly follow what was read last."""
        start = offset - self._held_at
        if start < 0 or start + size > len(self._held):
            self._held, self._held_at, start = self.archive.read(offset, max(size, _WINDOW)), offset, 0
        return self._held[start : start + size]

    def __iter__(self) -> Iterator[Member]:
        if not self.archive.size:
            raise DataError(f"{self.archive.path} is empty")
        while (block := self.read(self._at, BLOCK)) != _ZERO:
            kind = block[156:157]
            self._refuse_damage(block)
            name = _header_name(block)
            size = self._size_of(name, block, kind)
            start = self._at + BLOCK
            self._at = start + -(-size // BLOCK) * BLOCK
            if self._at > self.archive.size:
                raise self.refusal(name, self._cut(start, size))
            if kind in b"xgL":
                self._extend(kind, name, start, size)
                continue
            member = self._member(kind, name, start, size)
            if member is not None:
                yield member
        self._refuse_rest()

    def _cut(self, start: int, size: int) -> str:
        """What is wrong where the archive ends before the block after a member."""
        left = self.archive.size - start
        if left < size:
            return f"claims {size} bytes, but the archive ends {left} later"
        return (
            f"is whole, but the archive ends at byte {start + left}, before its padding and end mark: it is truncated"
        )

    def _refuse_damage(self, block: bytes) -> None:
        path = self.archive.path
        if len(block) == BLOCK and _octal(block[148:156]) in _checksums(block):
            return
        packed = [name for magic, name in _PACKED.items() if not self._at and block.startswith(magic)]
        if packed:
            raise DataError(f"{path} is packed ({packed[0]}): {NEEDS_PLAIN}")
        if len(block) < BLOCK:
            raise DataError(f"{path} ends at byte {self.archive.size} without an end mark: it is truncated")
        raise DataError(f"{path}: no tar header at byte {self._at}: damaged, or not a tar archive")

    def _size_of(self, name: bytes, block: bytes, kind: bytes) -> int:
        size = _number(block[124:136])
        if size is None:
            raise self.refusal(name, f"has the size {block[124:136]!r}, which is not a number that can be")
        if kind in b"xgL" or self._size is None:
            return size
        return self._size

    def _extend(self, kind: bytes, name: bytes, start: int, size: int) -> None:
        """Take in a pax header or a long name."""
        most = MOST_NAME + 1 if kind == b"L" else MOST_EXTENDED
        if size > most:
            raise self.refusal(name, f"is an extended header of {size} bytes; they go to {most}")
        if self._name is not None or self._size is not None:
            raise self.refusal(name, "is an extended header after another")
        data = self.read(start, size)
        if kind == b"L":
            self._name = data.removesuffix(b"\0")
            return
        try:
            records = pax_records(data)
        except ValueError as error:
            raise self.refusal(name, f"is a damaged extended header: {error}") from None
        for key in records:
            if key.startswith(b"GNU.sparse"):
                raise self.refusal(name, "announces a sparse file")
            if key == b"linkpath" or (kind == b"g" and key in (b"path", b"size")):
                raise self.refusal(name, f"is an extended header that sets {key.decode()}")
        self._name = records.get(b"path")
        if b"size" in records:
            self._size = _decimal(records[b"size"])
            if self._size is None:
                raise self.refusal(name, f"is an extended header with the size {records[b'size'][:20]!r}")

    def _member(self, kind: bytes, name: bytes, start: int, size: int) -> Member | None:
        """The file whose header was read; None for a folder."""
        name = name if self._name is None else self._name
        self._name = self._size = None
        if kind in _KINDS:
            raise self.refusal(name, f"is {_KINDS[kind]}")
        if kind not in (b"0", b"\0", b"7", b"5"):
            raise self.refusal(name, f"is of the unknown kind {kind!r}")
        if len(name) > MOST_NAME:
            raise self.refusal(name, f"has a name of {len(name)} bytes; they go to {MOST_NAME}")
        if not name or b"\0" in name:
            raise self.refusal(name, "has no name" if not name else "has a name with a zero byte")
        if name.startswith(b"/"):
            raise self.refusal(name, "has an absolute name")
        parts = [part for part in name.split(b"/") if part not in (b"", b".")]
        if b".." in parts:
            raise self.refusal(name, "has .. in its name")
        if kind == b"5" or (kind == b"\0" and name.endswith(b"/")):
            if size:
                raise self.refusal(name, f"is a folder of {size} bytes")
            return None
        if not parts or name.endswith(b"/"):
            raise self.refusal(name, "is a file with the name of a folder")
        return Member(b"/".join(parts), start, size)

    def _refuse_rest(self) -> None:
        path = self.archive.path
        if self._name is not None or self._size is not None:
            raise DataError(f"{path} ends after an extended header: it is truncated")
        if self.archive.read(self._at, _TAIL).strip(b"\0"):
            raise DataError(f"{path} goes on after its end mark at byte {self._at}: archives glued together?")


def pax_records(data: bytes) -> dict[bytes, bytes]:
    """The records "LENGTH KEY=VALUE\\n" of an extended header; the last of a key counts. ValueError for damage."""
    records, at = {}, 0
    while at < len(data):
        space = data.find(b" ", at, at + 8)
        length = _decimal(data[at:space]) if space > at else None
        if length is None or length > len(data) - at:
            raise ValueError(f"no record's length at byte {at}")
        record = data[space + 1 : at + length]
        key, equals, value = record.partition(b"=")
        if not key or not equals or not record.endswith(b"\n"):
            raise ValueError(f"the record at byte {at} is not KEY=VALUE and a line's end")
        records[key] = value[:-1]
        at += length
    return records


def _header_name(block: bytes) -> bytes:
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0":  # "ustar " is GNU's, with other fields in this place
        prefix = block[345:500].split(b"\0", 1)[0]
        if prefix:
            return prefix + b"/" + name
    return name


def _checksums(block: bytes) -> tuple[int, int]:
    """The sum of the header's bytes with its own field as spaces; historic programs took the bytes as signed."""
    total = sum(block) - sum(block[148:156]) + 8 * 32
    if block.isascii():
        return total, total
    others = block[:148] + block[156:]
    return total, total - 256 * sum(byte >= 128 for byte in others)


def _octal(field: bytes) -> int | None:
    digits = field.strip(b" \0")
    if not digits or digits.strip(b"01234567"):
        return None
    return int(digits, 8)


def _number(field: bytes) -> int | None:
    """A numeric field: octal, or GNU's base 256 with the first bit set. None if it is negative or no number."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    return _octal(field)


def _decimal(text: bytes) -> int | None:
    return int(text) if 0 < len(text) <= 20 and text.isdigit() else None
