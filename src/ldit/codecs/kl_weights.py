"""The weights in an autoencoder's folder: read one tensor at a time under current names, and their fingerprint."""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ldit.codecs.kl_config import KLConfig
from ldit.errors import CodecError, SourceError
from ldit.storage.pickled import open_state
from ldit.storage.shards import SUFFIX, has_set, read_set, set_files

STEM = "diffusion_pytorch_model"
PICKLED = f"{STEM}.bin"

# diffusers renamed the matrices of attention in 2023. Files from LDM store them as 1x1 convolutions.
_OLD = re.compile(r"(.*\battentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")
_NEW = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_MATRIX = re.compile(r".*\battentions\.\d+\.(to_q|to_k|to_v|to_out\.0)\.weight")


def weight_files(folder: Path) -> list[str]:
    """Names of the files with the weights; CodecError if there are none or a shard is missing."""
    try:
        if has_set(folder, STEM):
            return set_files(folder, STEM)
    except SourceError as error:
        raise CodecError(str(error)) from None
    if (folder / PICKLED).is_file():
        return [PICKLED]
    raise CodecError(f"{folder} has neither {STEM}{SUFFIX}, nor its shards, nor {PICKLED}")


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Named tensors one by one, memory-mapped; old names and shapes of attention are converted.

    CodecError for files that are missing, damaged, or contain anything but tensors.
    """
    try:
        if weight_files(folder) == [PICKLED]:
            tensors = iter(_pickled(folder / PICKLED).items())
        else:
            tensors = read_set(folder, STEM)
        for name, tensor in tensors:
            yield _renamed(name, tensor)
    except SourceError as error:
        raise CodecError(str(error)) from None


def _pickled(path: Path) -> dict[str, Tensor]:
    state = open_state(path)
    total = sum(tensor.nbytes for tensor in state.values() if tensor.layout is torch.strided)
    if total > path.stat().st_size:  # a small file may declare many tensors over the same numbers
        raise CodecError(f"{path}: its tensors claim {total} bytes, more than the file has")
    return state


def _renamed(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    if old := _OLD.fullmatch(name):
        name = f"{old[1]}.{_NEW[old[2]]}.{old[3]}"
    if _MATRIX.fullmatch(name) and tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
        tensor = tensor[:, :, 0, 0]
    return name, tensor


def fingerprint(folder: Path, config: KLConfig) -> str:
    """sha256 of what the network computes: its configuration, and each tensor's name, shape and fp32 numbers.

    It is the same for .safetensors, shards and .bin, and for old and new names. It changes with any bit of any number
    in fp32. Needs the memory of one tensor.
    """
    entries = sorted((name, list(tensor.shape), _digest(tensor)) for name, tensor in read_tensors(folder))
    body = {"kind": "autoencoder_kl", "config": config.function(), "tensors": entries}
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _digest(tensor: Tensor) -> str:
    """sha256 of the numbers as little-endian fp32, row by row."""
    numbers = tensor.detach().to(torch.float32).contiguous().reshape(-1)
    return hashlib.sha256(numbers.numpy().astype("<f4", copy=False).data).hexdigest()
