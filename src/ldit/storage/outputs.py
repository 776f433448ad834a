"""Files that a long work ends in: looked at before it begins, and faults said in one line that names them."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ldit.errors import RequestError
from ldit.storage.manifest import check_not_in_checkpoint


def check_target(file: Path, inputs: Iterable[Path] = ()) -> None:
    """RequestError for a file that cannot be written, is one of `inputs`, or would break what a manifest seals."""
    folder = file.absolute().parent
    if not folder.is_dir():
        raise RequestError(f"no folder {folder} to write {file.name} into")
    if file.is_dir():
        raise RequestError(f"{file} is a folder, expected the name of a file")
    if not os.access(folder, os.W_OK):
        raise RequestError(f"{folder}: {file.name} cannot be written there")
    if file.exists() and any(one.exists() and file.samefile(one) for one in inputs):
        raise RequestError(f"{file} is what is read, and would be replaced: choose another name")
    check_not_in_checkpoint(file)


@contextmanager
def written(file: Path) -> Iterator[None]:
    """RequestError for faults of the file system."""
    try:
        yield
    except OSError as error:
        raise RequestError(f"{file} was not written: {error.strerror or error}") from None
