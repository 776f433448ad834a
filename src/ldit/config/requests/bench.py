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
    """Options: which training step is measured."""

    size: Size = "600m"
    """Size of the network."""
    batch: int = 64
    """Images per step."""
    micro: int | None = None
    """Images per forward pass. Default: the batch, or the largest part of it that fits the device."""
    precision: Precision = "bf16"
    """Dtype of computation; master weights are fp32."""
    variants: tuple[Variant, ...] = VARIANTS
    """Implementations: original (the original's step), fused (ours), compiled (ours with compiled blocks)."""
    steps: int = 5
    """Steps per round."""
    rounds: int = 3
    """Rounds per variant; reported are their median and range."""
    recompute: Recompute = "none"
    """Activation checkpointing: none, selective (saves matmuls and attention, recomputes the rest), full."""
    ema: bool = True
    """Update a moving average of the weights, as training does."""
    host_ema: bool = False
    """Keep the average in host memory."""
    muon: bool = False
    """Train with Muon instead of AdamW."""
    moments: Literal["fp32", "bf16", "int8"] = "fp32"
    """How AdamW stores its moments."""
    device: Literal["cpu", "cuda"] | None = None
    """Device. Default: the GPU where there is one."""
    json: Path | None = None
    """File for the report as JSON, which is also the last line of stdout."""


@dataclass(frozen=True)
class BenchSampleRequest:
    """Options: what is sampled in the measurement."""

    size: Size = "600m"
    """Size of the network."""
    batch: tuple[int, ...] = (1, 8)
    """Images sampled at once; each number is measured."""
    steps: int = 20
    """Number of solver steps."""
    solver: str = "unipc2"
    """Solver, one of those of `ldit sample`."""
    guidance: float = 4.0
    """Scale of classifier-free guidance; 1 = off, which halves the work."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Dtype of the weights. Default: fp32 on the CPU, bf16 on a GPU."""
    int8: bool = False
    """Matrix products in 8 bits (CPU only)."""
    compile: bool = False
    """Compile the blocks with torch.compile."""
    graphs: bool = field(default=False, metadata=flag("graph"))
    """Run each evaluation of the network as one CUDA graph (GPU); without it kernels are launched one by one."""
    host_modulation: bool = False
    """Keep the adaLN weights in host memory."""
    rounds: int = 3
    """Number of rounds."""
    device: Literal["cpu", "cuda"] | None = None
    """Device. Default: the GPU where there is one."""
    json: Path | None = None
    """File for the report as JSON, which is also the last line of stdout."""
