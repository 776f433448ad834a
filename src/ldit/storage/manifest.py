"""manifest.json: size and sha256 of every file of a folder, and a checksum of the manifest itself."""

import errno
import hashlib
import json
import mmap
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ldit.errors import LditError, RequestError, RunError, SourceError
from ldit.storage import verified
from ldit.storage.strange import damaged

NAME = "manifest.json"
FORMAT = 1
_CHUNK = 1 << 20
_BLOCK = 1 << 16  # bytes whose words are summed
_BLOCKS_A_PART = 256  # 16 MiB for a thread at a time


class Record(NamedTuple):
    """A file's entry in the manifest."""

    size: int
    sha256: str


def check_not_in_checkpoint(target: Path) -> None:
    """RequestError when `target` is inside a folder with a manifest, where a new or changed file counts as damage."""
    path = target.resolve()
    sealed = next((folder for folder in (path, *path.parents) if _seals(folder / NAME)), None)
    if sealed is not None:
        raise RequestError(f"{target} cannot be written: {sealed} is sealed by its {NAME}, choose a name outside")


def _seals(path: Path) -> bool:
    """Whether this is an ldit manifest, intact or damaged; other programs use the same file name."""
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        return False
    except (OSError, ValueError, RecursionError):
        return path.is_file()
    return isinstance(data, dict) and {"files", "sha256"} <= data.keys()


def sha256_file(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(_CHUNK))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def block_digest(path: Path) -> str:
    """Hex sha256 of the sums of the file's blocks of 64 KiB, each the sum of its 8-byte little-endian words mod 2^64.

    It notices damage as a checksum does (any flipped bit, lost, zeroed or exchanged blocks), at the speed of memory and
    in threads: 10 times as fast as sha256 on 2 cores. It is no protection against a forger: sha256 is.
    """
    if not path.stat().st_size:
        return hashlib.sha256().hexdigest()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        data = np.frombuffer(mapped, np.uint8)
        whole = len(data) // _BLOCK * _BLOCK
        words = data[:whole].view("<u8").reshape(-1, _BLOCK // 8)
        parts = [words[i : i + _BLOCKS_A_PART] for i in range(0, len(words), _BLOCKS_A_PART)]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            sums = list(pool.map(lambda part: part.sum(1, dtype=np.uint64), parts))
        digest = hashlib.sha256(b"".join(part.tobytes() for part in sums))
        digest.update(data[whole:].tobytes())
        del data, words, parts  # a map with views on it cannot be closed
    return digest.hexdigest()


def _body_digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def build(
    folder: Path, known: Mapping[str, Record] | None = None, extra: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The manifest of every file below `folder`. Files in `known` were hashed while they were written; RunError when
    one of them is missing. `extra`: see `sealed`."""
    files, blocks = {}, {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name != NAME:
            if known and name in known:
                files[name] = known[name]
                continue
            files[name] = Record(path.stat().st_size, sha256_file(path))
            # Large files also get a digest that is found faster. Those that other processes wrote are not read for it.
            if files[name].size >= verified.LEAST:
                blocks[name] = block_digest(path)
    for lost in sorted((known or {}).keys() - files.keys()):
        raise RunError(f"{folder / lost} was written and has disappeared")
    return sealed(files, extra, blocks)


def sealed(
    files: Mapping[str, Record], extra: Mapping[str, Any] | None = None, blocks: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The manifest of `files`. `extra`: further keys besides "format" and "files", with JSON values; the manifest's own
    checksum covers them. `blocks`: the `block_digest` of files that have one."""
    entries = {name: record._asdict() for name, record in files.items()}
    for name, digest in (blocks or {}).items():
        entries[name]["blocks"] = digest
    body = {"format": FORMAT, "files": entries, **(extra or {})}
    return {**body, "sha256": _body_digest(body)}


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """File name -> {"size", "sha256"}; SourceError when the manifest is missing, damaged or of a newer format."""
    files: dict[str, dict[str, Any]] = read_body(folder)["files"]
    return files


def read_body(folder: Path, name: str = NAME) -> dict[str, Any]:
    """The complete manifest, including extra keys and its own checksum, from file `name`; SourceError as from
    `read`."""
    path = folder / name
    # Parse, and compute the checksum of the body.
    try:
        data = json.loads(path.read_bytes())
        body = {key: value for key, value in data.items() if key != "sha256"}
        stated, version, files = data["sha256"], data["format"], data["files"]
        sound = isinstance(version, int) and _body_digest(body) == stated
    except FileNotFoundError:
        raise SourceError(f"{path} is missing") from None
    except OSError as error:
        raise _unreadable(path, error) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise SourceError(f"{path} is damaged: not a manifest") from None
    # The format first: a newer one may compute its checksum in another way.
    if isinstance(version, int) and version > FORMAT:
        raise SourceError(f"{path}: format {version} is newer than {FORMAT}; update ldit")
    if not sound:
        raise SourceError(f"{path} is damaged: its own checksum does not match")
    if not isinstance(files, dict) or not all(_sound_entry(name, entry) for name, entry in files.items()):
        raise SourceError(f"{path} is damaged: it has an entry that is not a file below its folder")
    return dict(data)


def _sound_entry(name: str, entry: Any) -> bool:
    """Whether an entry has a relative name inside the folder, a size and a digest."""
    parts = Path(name).parts
    inside = bool(parts) and not Path(name).is_absolute() and ".." not in parts and "\0" not in name
    return (
        inside
        and isinstance(entry, dict)
        and isinstance(entry.get("size"), int)
        and isinstance(entry.get("sha256"), str)
    )


# Temporary errors of a network or a busy machine, which do not mean that the file is damaged. EIO, of a failing disk,
# does.
_TEMPORARY = (errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)


def _unreadable(path: Path, error: OSError) -> LditError:
    kind = RunError if error.errno in _TEMPORARY else SourceError
    return kind(f"{path} cannot be read: {error.strerror or error}")


def _shared(names: Iterable[str], files: dict[str, dict[str, Any]], index: int, count: int) -> list[str]:
    """The names of share `index` of `count`. Files are assigned from the largest, each to the share with the fewest
    bytes so far."""
    shares: list[list[str]] = [[] for _ in range(count)]
    bytes_of = [0] * count
    sizes = {name: files.get(name, {}).get("size", 0) for name in names}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = bytes_of.index(min(bytes_of))
        shares[least].append(name)
        bytes_of[least] += sizes[name]
    return sorted(shares[index])


def verify(
    folder: Path, names: Iterable[str] | None = None, share: tuple[int, int] = (0, 1), remembered: bool = False
) -> None:
    """Compare the files `names` with the manifest; by default every listed file, and check that there is no other.
    With `share` (i, n), check only the i-th of n shares of about equal size. With `remembered`, a large file is
    compared by its digest of blocks where there is one, and not read again while it does not change
    (`ldit.storage.verified`).

    SourceError names the first file that is missing, extra or damaged. RunError names a file that cannot be read at the
    moment but may be intact.
    """
    files = read(folder)
    # By default: every listed file, and no other may exist.
    if names is None:
        present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {NAME}
        for extra in sorted(present - files.keys()):
            raise SourceError(f"{folder / extra} is not in the manifest")
        names = files
    wanted = _shared(names, files, *share)
    # Files are hashed in threads, which the hash function lets run at the same time; the first fault by name is told.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for _ in pool.map(lambda name: _verify_file(folder / name, files.get(name), remembered), wanted):
            pass


def _verify_file(path: Path, entry: dict[str, Any] | None, remembered: bool) -> None:
    """`verify` for one file."""
    if entry is None:
        raise SourceError(f"{path} is not in the manifest")
    if not path.is_file():
        raise SourceError(f"{path} is missing")
    # Compare sizes first: a truncated file need not be read.
    try:
        state = verified.state_of(path)
        if state[0] != entry["size"]:
            raise SourceError(damaged(path, f"{state[0]} bytes, the manifest says {entry['size']}"))
        if remembered and verified.is_verified(path, state, entry["sha256"]):
            return
        if remembered and isinstance(entry.get("blocks"), str):
            is_sound = block_digest(path) == entry["blocks"]
        else:
            is_sound = sha256_file(path) == entry["sha256"]
    except OSError as error:
        raise _unreadable(path, error) from None
    if not is_sound:
        raise SourceError(f"{path} is damaged: its content does not match the manifest's checksum")
    if remembered:
        verified.remember(path, state, entry["sha256"])
