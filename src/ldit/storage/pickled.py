"""The one place that opens .pt and .pth files: weights only, with argparse.Namespace as the one class allowed."""

import argparse
import contextlib
import io
import pickle
import pickletools
import re
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ldit.errors import SourceError

# What a state dict, a train.py checkpoint and a Namespace are made of. torch's own list is longer, and holds calls that
# allocate whatever they are told to (bytearray, FloatTensor).
_ALLOWED = re.compile(
    r"collections OrderedDict|argparse Namespace|torch Size|torch device|torch\._utils _rebuild_tensor(_v2)?"
    r"|torch\._utils _rebuild_parameter|torch (Double|Float|Half|BFloat16|Long|Int|Short|Char|Byte|Bool)Storage"
    r"|torch (float64|float32|float16|bfloat16|int64|int32|int16|int8|uint8|bool)"
)
_LEGACY_PICKLES = 5  # files before torch 1.6: magic number, protocol, system, content, keys; then raw numbers


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
        if mapped:
            check_archive(path, check)
        _check_calls(path, mapped)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except SourceError:
        raise
    except pickle.UnpicklingError as error:
        raise SourceError(f"{path} is refused: {_refusal(str(error))}") from None
    except Exception as error:  # damaged pickles raise nearly anything
        raise SourceError(f"{path} is damaged: {type(error).__name__}: {str(error)[:200]}") from None


def open_state(path: Path, check: bool = True) -> dict[str, Tensor]:
    """A bare state dict, memory-mapped; `check` as in `load_pickled`."""
    return as_state(load_pickled(path, check), str(path))


def as_state(data: Any, where: str) -> dict[str, Tensor]:
    """`data`, read from `where`, as a state dict; SourceError when it is none, or claims numbers that are not there."""
    if not isinstance(data, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in data.items()):
        raise SourceError(f"{where} is not a state dict of tensors")
    for name, tensor in data.items():
        if tensor.layout == torch.strided and tensor.untyped_storage().nbytes() < tensor.nbytes:
            raise SourceError(f"{where}: {name} claims more numbers than the file holds")
    return data


def check_archive(path: Path, contents: bool = True) -> None:
    """Refuse compressed records, which torch never writes and which could be bombs; with `contents`, compare every
    record with its stored CRC-32, in small pieces."""
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [r.filename for r in archive.infolist() if r.compress_type != zipfile.ZIP_STORED]
            bad = archive.testzip() if contents and not packed else None
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError, ValueError) as error:
        raise SourceError(f"{path} is damaged: {error}") from None
    if packed:
        raise SourceError(f"{path} is refused: its record {packed[0]} is compressed")
    if bad is not None:
        raise SourceError(f"{path} is damaged: the checksum of its record {bad} does not match")


def _check_calls(path: Path, archive: bool) -> None:
    """Refuse every class but those of `_ALLOWED`, reading the instructions without following them: a few bytes of
    pickle could ask torch's unpickler for gigabytes."""
    if archive:
        with zipfile.ZipFile(path) as zipped:
            records = [r for r in zipped.infolist() if r.filename.lower().endswith("data.pkl")]
            streams: list[IO[bytes]] = [io.BytesIO(zipped.read(record)) for record in records]
    else:
        streams = [path.open("rb")]
    for stream in streams:
        with stream, contextlib.suppress(ValueError, EOFError, UnicodeDecodeError, OverflowError, IndexError):
            for _ in range(1 if archive else _LEGACY_PICKLES):
                for code, argument, _ in pickletools.genops(stream):
                    if code.name in ("GLOBAL", "INST") and not _ALLOWED.fullmatch(str(argument)):
                        raise pickle.UnpicklingError(f"GLOBAL {str(argument).replace(' ', '.')}")


def _refusal(text: str) -> str:
    """What torch's unpickler met, without its advice to load the file unsafely."""
    named = re.search(r"(?:Unsupported global: )?GLOBAL (\S+)", text) or re.search(r"[Uu]nsupported \S+[^.]*", text)
    return f"it asks for {named[1] if named.lastindex else named[0]}" if named else "it holds more than tensors"
