"""Checks output files before the work, and turns errors of writing them into one line."""

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ldit.errors import RequestError, RunError
from ldit.storage.manifest import check_not_in_checkpoint

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk full, quota used up, file too large


def check_target(file: Path, inputs: Iterable[Path] = ()) -> None:
    """RequestError when a file cannot be written, is one of `inputs`, or is inside a checkpoint or cache."""
    folder = file.absolute().parent
    if not folder.is_dir():
        raise RequestError(f"no folder {folder} to write {file.name} into")
    if file.is_dir():
        raise RequestError(f"{file} is a folder, expected the name of a file")
    if not os.access(folder, os.W_OK):
        raise RequestError(f"{folder}: {file.name} cannot be written there")
    if file.exists() and any(path.exists() and file.samefile(path) for path in inputs):
        raise RequestError(f"{file} is an input and would be overwritten; choose another name")
    check_not_in_checkpoint(file)


def refuse_inside(out: Path, sources: Iterable[Path]) -> None:
    """RequestError when `out`, a file or folder to write, is one of `sources`, contains one, or lies inside one: its
    files would be read as images, or lie among them. Sources that do not exist, such as the name of an object, are
    passed over."""
    target = Path(os.path.realpath(out))
    for source in sources:
        if not source.exists():
            continue
        images = Path(os.path.realpath(source))
        for how, is_so in (
            ("is", target == images),
            ("is inside", images in target.parents),
            ("contains", target in images.parents),
        ):
            if is_so:
                raise RequestError(f"{out} {how} {source}, whose images are read; choose a place outside of it")


@contextmanager
def written(file: Path) -> Iterator[None]:
    """Turn errors of the file system into a RequestError that names the file."""
    try:
        yield
    except OSError as error:
        raise RequestError(f"{file} was not written: {error.strerror or error}") from None


def disk_error(error: OSError, path: Path, folder: Path, needs: str, kept: str) -> RunError:
    """The error for `path` that could not be written: the reason; on a full disk, what the work `needs` and what is
    free in `folder`; and what is `kept`."""
    why = error.strerror or str(error)
    if error.errno in _FULL and needs:
        why += f": {needs}"
        with suppress(OSError):
            why += f", {shutil.disk_usage(folder).free:,} are free"
    return RunError(f"{path} was not written: {why}; {kept}")
