"""manifest.json: size and sha256 of every file of a folder, and a checksum of the manifest itself."""

import errno
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ldit.errors import LditError, RequestError, RunError, SourceError
from ldit.storage.strange import damaged

NAME = "manifest.json"
FORMAT = 1
_CHUNK = 1 << 20


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
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _body_digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def build(
    folder: Path, known: Mapping[str, Record] | None = None, extra: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The manifest of every file below `folder`. Files in `known` were hashed while they were written; RunError when
    one of them is missing. `extra`: see `sealed`."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name != NAME:
            files[name] = (known or {}).get(name) or Record(path.stat().st_size, sha256_file(path))
    for lost in sorted((known or {}).keys() - files.keys()):
        raise RunError(f"{folder / lost} was written and has disappeared")
    return sealed(files, extra)


def sealed(files: Mapping[str, Record], extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The manifest of `files`. `extra`: further keys besides "format" and "files", with JSON values; the manifest's own
    checksum covers them."""
    body = {"format": FORMAT, "files": {name: record._asdict() for name, record in files.items()}, **(extra or {})}
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


def verify(folder: Path, names: Iterable[str] | None = None, share: tuple[int, int] = (0, 1)) -> None:
    """Compare the files `names` with the manifest; by default every listed file, and check that there is no other.
    With `share` (i, n), check only the i-th of n shares of about equal size.

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
    # Compare sizes first: a truncated file need not be read.
    for name in _shared(names, files, *share):
        path, entry = folder / name, files.get(name)
        if entry is None:
            raise SourceError(f"{path} is not in the manifest")
        if not path.is_file():
            raise SourceError(f"{path} is missing")
        try:
            size = path.stat().st_size
            digest = sha256_file(path) if size == entry["size"] else ""
        except OSError as error:
            raise _unreadable(path, error) from None
        if size != entry["size"]:
            raise SourceError(damaged(path, f"{size} bytes, the manifest says {entry['size']}"))
        if digest != entry["sha256"]:
            raise SourceError(f"{path} is damaged: its content does not match the manifest's checksum")
