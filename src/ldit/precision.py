"""Words for dtypes, the same in every flag, file and report."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# What activations are computed in, by precision policy; tf32 is fp32 whose products are rounded inside.
COMPUTE = {**DTYPES, "tf32": torch.float32}

_WORDS = {"float32": "fp32", "F32": "fp32", "bfloat16": "bf16", "BF16": "bf16", "float16": "fp16", "F16": "fp16"}


def dtype_word(name: str) -> str:
    """torch's or safetensors' name of a dtype as our word; others stay as they are."""
    return _WORDS.get(name, name)


@contextmanager
def products(precision: str) -> Iterator[None]:
    """Within the block fp32 products are rounded to tf32 where the device has it, if that is the precision policy."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class _Unrounded:
    """What was set before the first thread came in is set again when the last one leaves."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._before = ("highest", True)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        cudnn = torch.backends.cudnn
        with self._lock:
            if not self._inside:
                self._before = torch.get_float32_matmul_precision(), cudnn.allow_tf32
                torch.set_float32_matmul_precision("highest")
                cudnn.allow_tf32 = False
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    torch.set_float32_matmul_precision(self._before[0])
                    cudnn.allow_tf32 = self._before[1]


unrounded = _Unrounded()
"""Within `with unrounded():` fp32 is fp32: neither products nor convolutions, for which it is cuDNN's default, are
rounded to tf32. The settings are the process's: other threads compute so meanwhile."""
