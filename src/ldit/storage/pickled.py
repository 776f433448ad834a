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
from ldit.storage.strange import damaged, what_is_it

# Everything that a state dict, a train.py checkpoint and a Namespace are made of. torch's own list is longer and
# includes calls that allocate any amount of memory (bytearray, FloatTensor).
_ALLOWED = re.compile(
    r"collections OrderedDict|argparse Namespace|torch Size|torch device|torch\._utils _rebuild_tensor(_v2)?"
    r"|torch\._utils _rebuild_parameter|torch (Double|Float|Half|BFloat16|Long|Int|Short|Char|Byte|Bool)Storage"
    r"|torch (float64|float32|float16|bfloat16|int64|int32|int16|int8|uint8|bool)"
)
_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_forward_module.")
_LEGACY_PICKLES = 5  # files before torch 1.6: magic number, protocol, system, content, keys; then raw numbers


def load_pickled(path: Path, check: bool = True) -> Any:
    """Content of a torch file, with tensors memory-mapped on the CPU.

    SourceError for a missing, truncated, corrupted or malicious file. Only tensors, containers and Namespaces are
    built, so a malicious pickle runs no code. Without `check`, checksums are not compared, which saves reading the
    content.
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
    except Exception as error:  # a damaged pickle may raise any type
        if why := what_is_it(path):
            raise SourceError(f"{path} {why}") from None
        if isinstance(error, pickle.UnpicklingError):
            raise SourceError(f"{path} is refused: {_refusal(str(error))}") from None
        raise SourceError(f"{path} is damaged: {type(error).__name__}: {str(error)[:200]}") from None


def open_state(path: Path, check: bool = True) -> dict[str, Tensor]:
    """A bare state dict, memory-mapped; `check` as in `load_pickled`."""
    return as_state(load_pickled(path, check), str(path))


def as_state(data: Any, where: str) -> dict[str, Tensor]:
    """`data`, read from `where`, as a state dict without the prefixes of wrappers; SourceError when it is none, or a
    tensor exceeds its storage."""
    if not isinstance(data, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in data.items()):
        raise SourceError(f"{where} is not a state dict of tensors")
    for name, tensor in data.items():
        if tensor.layout == torch.strided and tensor.untyped_storage().nbytes() < tensor.nbytes:
            raise SourceError(f"{where}: {name} claims more numbers than the file holds")
    return unwrapped(data)


def unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict without prefixes that all names share and that modules around the network add: those of DDP
    (module.), torch.compile (_orig_mod.) and FSDP, in any order."""
    while prefix := next((word for word in _WRAPPERS if state and all(name.startswith(word) for name in state)), ""):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def check_archive(path: Path, contents: bool = True) -> None:
    """SourceError for compressed records, which torch never writes and which may expand without limit. With `contents`,
    also compare every record with its CRC-32, in small pieces."""
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [r.filename for r in archive.infolist() if r.compress_type != zipfile.ZIP_STORED]
            bad = archive.testzip() if contents and not packed else None
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError, ValueError) as error:
        raise SourceError(damaged(path, error)) from None
    if packed:
        raise SourceError(f"{path} is refused: its record {packed[0]} is compressed")
    if bad is not None:
        raise SourceError(f"{path} is damaged: the checksum of its record {bad} does not match")


def _check_calls(path: Path, archive: bool) -> None:
    """Refuse every class that is not in `_ALLOWED`. The pickle's instructions are read without executing them, because
    a few bytes can make torch's unpickler allocate gigabytes."""
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
    """The reason in the message of torch's unpickler, without its advice to load the file unsafely."""
    named = re.search(r"(?:Unsupported global: )?GLOBAL (\S+)", text) or re.search(r"[Uu]nsupported \S+[^.]*", text)
    return f"it asks for {named[1] if named.lastindex else named[0]}" if named else "it holds more than tensors"
