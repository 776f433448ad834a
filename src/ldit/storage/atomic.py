"""Atomic files and folders: written under a temporary name, fsynced, renamed; folders get a manifest."""

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldit.errors import SourceError
from ldit.storage import manifest
from ldit.storage.strange import damaged

_MARK = ".tmp-"
_ASIDE = ".old-"
# Names used here, for outputs (with their suffix), and when old steps are removed.
_LEFTOVER = re.compile(r"(.+)\.(tmp|old)-([0-9a-f]{8}|old)(\.\w+)?$")


def fsync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make a folder and its parents, and fsync each."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        fsync(path.parent)


def read_json(path: Path) -> Any:
    """Parsed JSON; SourceError for a missing or damaged file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SourceError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(damaged(path, error)) from None


def json_text(data: Any) -> str:
    """JSON as the files of `ldit` have it."""
    return json.dumps(data, indent=1) + "\n"


def write_json(path: Path, data: Any) -> None:
    path.write_text(json_text(data), encoding="utf-8")


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yields the path of a temporary file in the same folder; on success it replaces `path`."""
    temporary = path.with_name(f"{path.name}{_MARK}{uuid.uuid4().hex[:8]}")
    try:
        yield temporary
        fsync(temporary)
        os.replace(temporary, path)
        fsync(path.parent)
    except OSError as error:
        if error.filename is None:  # writing, unlike opening, does not name the file
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json_atomic(path: Path, data: Any) -> None:
    """Replace a JSON file atomically: a reader sees the old content or the new."""
    with replaced(path) as temporary:
        write_json(temporary, data)


class Commit:
    """A temporary folder that becomes `final` (`finish`) or is removed (`abort`). Several processes may write into
    `folder`; one commits it."""

    def __init__(self, final: Path) -> None:
        make_folder(final.parent)
        self.final = final
        self.folder = final.with_name(f"{final.name}{_MARK}{uuid.uuid4().hex[:8]}")
        self.folder.mkdir()

    def finish(self, known: Mapping[str, manifest.Record] | None = None) -> None:
        """Write the manifest, fsync, rename. An existing `final` is moved aside, and removed once the new one is in its
        place. Files in `known` have been fsynced already and have these sizes and digests."""
        write_json(self.folder / manifest.NAME, manifest.build(self.folder, known))
        for path in [*self.folder.rglob("*"), self.folder]:
            if path.relative_to(self.folder).as_posix() not in (known or {}):
                fsync(path)
        _replace(self.folder, self.final)
        fsync(self.final.parent)

    def abort(self) -> None:
        """Remove the temporary folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def committed(final: Path) -> Iterator[Path]:
    """Yields a temporary folder; on success it becomes `final`, on failure it is removed."""
    commit = Commit(final)
    try:
        yield commit.folder
        commit.finish()
    except BaseException:
        commit.abort()
        raise


def _replace(new: Path, final: Path) -> None:
    """Rename `new` to `final`. An old `final` is moved aside first. It is moved back if the second rename fails, or by
    the next `remove_leftovers` if the process dies in between."""
    old = final.with_name(f"{final.name}{_ASIDE}{uuid.uuid4().hex[:8]}")
    if final.exists():
        os.rename(final, old)
    try:
        os.rename(new, final)
    except BaseException:
        if old.exists():
            os.rename(old, final)
        raise
    if old.exists():
        shutil.rmtree(old, ignore_errors=True)


def remove_leftovers(parent: Path) -> None:
    """Delete temporary files and folders that a killed process left in `parent`; move back what it had moved aside."""
    for path in list(parent.iterdir()) if parent.is_dir() else ():
        if not (match := _LEFTOVER.match(path.name)):
            continue
        if match[2] == "old" and not (final := path.with_name(match[1])).exists():
            os.rename(path, final)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)  # files open on NFS remain: the next start tries again
        else:
            path.unlink(missing_ok=True)
