"""The requests of `ldit bench train` and `ldit bench sample`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ldit.config.requests.fields import flag
from ldit.config.sections import Precision, Recompute

Size = Literal["tiny", "600m", "3b", "7b"]
Variant = Literal["original", "fused", "compiled"]
VARIANTS: tuple[Variant, ...] = ("original", "fused", "compiled")


@dataclass(frozen=True)
class BenchTrainRequest:
    """Options: a measurement of the training step."""

    size: Size = "600m"
    """Network."""
    batch: int = 64
    """Images a step."""
    micro: int | None = None
    """Images in one pass. Default: the batch."""
    precision: Precision = "bf16"
    """Precision policy."""
    variants: tuple[Variant, ...] = VARIANTS
    """Forms of the step: as the original takes it, ours, ours with compiled blocks."""
    steps: int = 5
    """Steps in a round."""
    rounds: int = 3
    """Rounds."""
    recompute: Recompute = "none"
    """Activation checkpointing: what is recomputed in the backward pass."""
    ema: bool = True
    """Keep a moving average, as training does."""
    device: Literal["cpu", "cuda"] | None = None
    """Default: the GPU where there is one."""
    json: Path | None = None
    """File for the report; it is the last line of stdout too."""


@dataclass(frozen=True)
class BenchSampleRequest:
    """Options: a measurement of sampling."""

    size: Size = "600m"
    """Network."""
    batch: tuple[int, ...] = (1, 8)
    """Images at once, one measurement each."""
    steps: int = 20
    """Grid intervals."""
    solver: str = "unipc2"
    """Solver, as `ldit sample` knows them."""
    guidance: float = 4.0
    """Guidance scale; 1 = no guided rows."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Default: fp32 on the CPU, bf16 on a GPU."""
    int8: bool = False
    """8-bit products, CPU only."""
    compile: bool = False
    """Compile the blocks."""
    graphs: bool = field(default=False, metadata=flag("graph"))
    """Each evaluation as one CUDA graph (GPU)."""
    host_modulation: bool = False
    """Keep the adaLN weights on the host."""
    rounds: int = 3
    """Rounds."""
    device: Literal["cpu", "cuda"] | None = None
    """Default: the GPU where there is one."""
    json: Path | None = None
    """File for the report; it is the last line of stdout too."""
