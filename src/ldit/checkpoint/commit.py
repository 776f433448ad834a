"""Folders that appear whole or not at all: write beside, manifest, fsync, rename, fsync the parent."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldit.checkpoint import manifest

_MARK = ".tmp-"


def fsync(path: Path) -> None:
    """Push a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_json_atomic(path: Path, data: Any) -> None:
    """Replace a single JSON file whole."""
    temporary = path.with_name(f"{path.name}{_MARK}{uuid.uuid4().hex[:8]}")
    write_json(temporary, data)
    fsync(temporary)
    os.replace(temporary, path)
    fsync(path.parent)


@contextmanager
def committed(final: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `final`; on success it becomes `final`, on failure it is removed.

    An existing `final` is replaced: moved aside first, removed after the new one stands.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f"{final.name}{_MARK}{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        yield temporary
        manifest_data = manifest.build(temporary)
        write_json(temporary / manifest.NAME, manifest_data)
        for path in [*temporary.rglob("*"), temporary]:
            fsync(path)
        if final.exists():
            old = final.with_name(f"{final.name}{_MARK}{uuid.uuid4().hex[:8]}")
            os.rename(final, old)
            os.rename(temporary, final)
            shutil.rmtree(old)
        else:
            os.rename(temporary, final)
        fsync(final.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove_leftovers(parent: Path) -> None:
    """Delete what a killed process left half written in `parent`."""
    for path in parent.glob(f"*{_MARK}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
