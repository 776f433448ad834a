"""What measurements are compared with: the device's name, its rate of matrix products, and timing of calls."""

import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ldit.errors import ConfigError
from ldit.rng import normal


def open_device(name: str | None) -> torch.device:
    """The device of that name; None = the GPU if there is one, else the CPU. ConfigError if cuda is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no GPU here")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def device_name(device: torch.device) -> str:
    """The name of the GPU or CPU, as its maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def wait(device: torch.device) -> None:
    """Wait until the device has done all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, including all work that it queues on the device."""
    wait(device)
    began = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - began


def matrix_ceiling(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of square matrix products on this device, the best of three measurements.

    None for fp16 on a CPU, which emulates fp16: other operations of a network may be faster, so it would be no ceiling.
    """
    if (device.type, dtype) == ("cpu", torch.float16):
        return None
    side, count = (8192, 20) if device.type == "cuda" else (1024, 3)
    a, b = (normal((side, side), 0, "gemm", i).to(device, dtype) for i in range(2))
    products = lambda: [a @ b for _ in range(count)]  # noqa: E731
    return 2.0 * side**3 * count / min(timed(products, device) for _ in range(3))
