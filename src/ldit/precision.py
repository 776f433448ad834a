"""Names of dtypes, the same in all flags, files and reports; when fp32 products are rounded to TF32."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# The dtype of activations, by precision policy. tf32: activations are fp32, matrix products are rounded.
COMPUTE = {**DTYPES, "tf32": torch.float32}

_WORDS = {"float32": "fp32", "F32": "fp32", "bfloat16": "bf16", "BF16": "bf16", "float16": "fp16", "F16": "fp16",
          "int8": "int8", "I8": "int8"}  # fmt: skip


def dtype_word(name: str) -> str:
    """Our name for a dtype's name in torch or safetensors; other names are returned as they are."""
    return _WORDS.get(name, name)


@contextmanager
def products(precision: str) -> Iterator[None]:
    """A block in which fp32 products and convolutions are rounded to TF32, on devices that have it, if `precision` is
    "tf32", and not rounded otherwise (by default cuDNN rounds convolutions). The settings are restored afterwards."""
    cudnn = torch.backends.cudnn
    before = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        cudnn.allow_tf32 = before[1]


class _Unrounded:
    """The context manager `unrounded`. Several threads may be inside: the first one to enter saves the settings, the
    last one to leave restores them."""

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
"""Within `with unrounded():` neither fp32 products nor convolutions are rounded to TF32 (by default cuDNN rounds
convolutions). The settings are global to the process: they apply to other threads too."""
