"""The only place that opens .pt and .pth files: weights-only, with argparse.Namespace as the one allowed class."""

import argparse
import contextlib
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from ldit.errors import SourceError

_CHUNK = 1 << 22


def load_pickled(path: Path, check: bool = True) -> Any:
    """Content of a torch file, tensors memory-mapped on the CPU.

    SourceError for a missing, truncated, bit-flipped or hostile file: nothing but tensors, containers and Namespaces
    is ever built, so a hostile pickle runs no code. Without `check` the content's checksums are not compared, which
    spares reading it.
    """
    if not path.is_file():
        raise SourceError(f"{path} is missing")
    try:
        mapped = zipfile.is_zipfile(path)
        if mapped and check:
            check_archive(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[0] if "Unsupported" not in str(error) else _refused(str(error))
        raise SourceError(f"{path} is refused: {reason}") from None
    except SourceError:
        raise
    except Exception as error:  # damaged pickles raise nearly anything
        raise SourceError(f"{path} is damaged: {type(error).__name__}: {error}".splitlines()[0]) from None


def check_archive(path: Path) -> None:
    """Compare every record of the zip archive with its stored CRC-32, in small pieces."""
    try:
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                crc = 0
                with _unchecked(archive, record) as file:
                    while piece := file.read(_CHUNK):
                        crc = zlib.crc32(piece, crc)
                if crc != record.CRC:
                    raise SourceError(f"{path} is damaged: checksum of {record.filename} does not match")
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError) as error:
        raise SourceError(f"{path} is damaged: {error}") from None


def _unchecked(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> Any:
    """The record's bytes; zipfile checks the CRC at its end too, and names the record when it does not match."""
    return contextlib.closing(archive.open(record))


def _refused(text: str) -> str:
    for line in text.splitlines():
        if "Unsupported" in line or "GLOBAL" in line:
            return line.strip()
    return "it holds more than tensors"
