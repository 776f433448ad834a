"""Seeding: every random number is a function of (seed, stream, step, id), drawn on the CPU in fp32.

So numbers do not depend on resumes, the number of processes or the batch size. This function never changes.
"""

import hashlib

import torch
from torch import Tensor


def generator(seed: int, stream: str, step: int = 0, id: int | str = 0) -> torch.Generator:
    """A CPU generator seeded by the first 8 bytes (big-endian) of sha256("ldit|stream|seed|step|id")."""
    digest = hashlib.sha256(f"ldit|{stream}|{seed}|{step}|{id}".encode(errors="surrogateescape")).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))


def normal(shape: tuple[int, ...], seed: int, stream: str, step: int = 0, id: int | str = 0) -> Tensor:
    """Standard normal numbers, fp32 of `shape`."""
    return torch.randn(shape, generator=generator(seed, stream, step, id))


def uniform(seed: int, stream: str, step: int = 0, id: int | str = 0) -> float:
    """A number, uniform in [0, 1)."""
    return torch.rand((), generator=generator(seed, stream, step, id)).item()
