"""Output files: checked before the work, written whole or not at all, with errors of one line."""

import errno
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ldit.errors import RequestError, RunError
from ldit.storage.atomic import committed, fsync
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


def refuse_inside(out: Path, sources: Iterable[Path], may_contain: bool = False) -> None:
    """RequestError when `out`, a file or folder to write, is one of `sources`, contains one (unless it `may_contain`
    one), or lies inside one: its files would be read as images, or lie among them. Sources that do not exist, such as
    the name of an object, are passed over."""
    target = Path(os.path.realpath(out))
    for source in sources:
        if not source.exists():
            continue
        images = Path(os.path.realpath(source))
        for how, is_so in (
            ("is", target == images),
            ("is inside", images in target.parents),
            ("contains", target in images.parents and not may_contain),
        ):
            if is_so:
                raise RequestError(f"{out} {how} {source}, whose images are read; choose a place outside of it")


@contextmanager
def whole(file: Path, needs: int = 0, kept: str = "") -> Iterator[Path]:
    """Yields the path of a temporary file with the suffix of `file`, in the same folder; on success it replaces `file`,
    on failure nothing is left and an older file stays as it was.

    RunError names the file, the reason, and on a full disk the bytes that it `needs` (0 = unknown) and those that are
    free; `kept` says what else is safe. Writers of `ldit`'s commands end in this.
    """
    if file.is_symlink():
        file = Path(os.path.realpath(file))
    if file.exists() and not file.is_file():  # a device such as /dev/stdout: renaming would replace it
        with _explained(file, needs, kept):
            yield file
        return
    temporary = file.with_name(f".{file.stem}.tmp-{uuid.uuid4().hex[:8]}{file.suffix}")
    with _explained(file, needs, kept):
        try:
            yield temporary
            fsync(temporary)
            os.replace(temporary, file)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """`ldit.storage.atomic.committed`, with the errors of `whole`."""
    with _explained(final), committed(final) as folder:
        yield folder


def put(file: Path, content: bytes | str, kept: str = "") -> None:
    """Write a file's content whole or not at all, as `whole`."""
    data = content.encode(errors="surrogateescape") if isinstance(content, str) else content
    with whole(file, len(data), kept) as temporary:
        temporary.write_bytes(data)


@contextmanager
def _explained(path: Path, needs: int = 0, kept: str = "") -> Iterator[None]:
    """Errors of the file system as those of `whole`."""
    needed = f"it needs {needs:,} bytes" if needs else ""
    try:
        yield
    except OSError as error:
        named = error.filename
        if named is not None and not str(named).startswith(str(path)) and Path(str(named)).parent != path.parent:
            raise  # of another file, which is read
        raise disk_error(error, path, path.absolute().parent, needed, kept) from None
    except RuntimeError as error:
        if not any(word in str(error) for word in ("PytorchStreamWriter", "inline_container")):
            raise
        # torch.save does not say why it could not write.
        full = OSError(errno.ENOSPC, "the disk is full or the file too large")
        raise disk_error(full, path, path.absolute().parent, needed, kept) from None


def disk_error(error: OSError, path: Path, folder: Path, needs: str = "", kept: str = "") -> RunError:
    """The error for `path` that could not be written: the reason; on a full disk, what the work `needs` and what is
    free in `folder`; and what is `kept`."""
    why = error.strerror or str(error)
    if error.errno in _FULL:
        with suppress(OSError):
            free = f"{shutil.disk_usage(folder).free:,}"
            needs = f"{needs}, {free} are free" if needs else f"{free} bytes are free"
        why += f": {needs}"
    return RunError(f"{path} was not written: {why}" + (f"; {kept}" if kept else ""))
