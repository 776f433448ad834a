"""Named tensors: reads and writes safetensors, and fills a network without a second copy in memory."""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ldit.errors import SourceError
from ldit.storage.strange import damaged

NamedTensors = Iterable[tuple[str, Tensor]]


def read_safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Tensors of one file, memory-mapped, one by one; SourceError when the file is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError, ValueError) as error:
        raise SourceError(damaged(path, error)) from None


def safetensors_shapes(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """name -> (shape, dtype word) from the header alone."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise SourceError(damaged(path, error)) from None


def write_safetensors(path: Path, tensors: NamedTensors, dtype: torch.dtype | None = None) -> None:
    """Write tensors; floating-point ones are converted to `dtype` if given. OSError when the file cannot be written."""
    table = {
        name: (t.to(dtype) if dtype is not None and t.is_floating_point() else t).detach().contiguous().cpu()
        for name, t in tensors
    }
    try:
        save_file(table, path)
    except SafetensorError as error:  # it has the system's error in its text alone
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
    path.chmod(0o644)  # safetensors makes files that only the owner can read


def assign(
    model: nn.Module, tensors: NamedTensors, where: str, device: torch.device | str, dtype: torch.dtype | None
) -> None:
    """Put `tensors` into `model`, which was built on the meta device, converting one at a time.

    SourceError names missing and unknown entries and wrong shapes; `where` is the source, for messages.
    """
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    seen: set[str] = set()
    extra: list[str] = []
    for name, tensor in tensors:
        # Files may come from anywhere: check each entry. Unknown ones are reported together at the end.
        if name not in shapes:
            extra.append(name)
            continue
        if name in seen:
            raise SourceError(f"{where}: {name} occurs twice")
        if not tensor.is_floating_point() or tensor.layout is not torch.strided or tensor.is_meta:
            raise SourceError(f"{where}: {name} is a {tensor.dtype} tensor, expected plain floating-point numbers")
        if tuple(tensor.shape) != shapes[name]:
            raise SourceError(f"{where}: {name} has shape {tuple(tensor.shape)}, the model needs {shapes[name]}")
        # Replace the meta parameter.
        owner_name, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        old = getattr(owner, leaf)
        value = tensor.to(device=device, dtype=dtype)
        setattr(owner, leaf, nn.Parameter(value, requires_grad=old.requires_grad))
        seen.add(name)
    missing = [name for name in shapes if name not in seen]
    if missing or extra:
        problems = [f"{word} {_some(names)}" for word, names in (("missing", missing), ("unknown", extra)) if names]
        raise SourceError(f"{where}: {'; '.join(problems)}")


def _some(names: list[str], limit: int = 4) -> str:
    shown = ", ".join(name[:100] for name in names[:limit])
    return f"{len(names)} entries ({shown}{', …' if len(names) > limit else ''})"
