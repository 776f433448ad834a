"""The requests about checkpoints: `ldit info`, `ldit convert` and `ldit ema`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ldit.config.requests.fields import flag

Layout = Literal["ldit", "original", "diffusers", "pt"]
Process = Literal["ddpm", "flow"]
Dtype = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class ConvertRequest:
    """Options: what is converted into which layout."""

    source: str = field(metadata=flag(positional=True))
    """Checkpoint: run directory, folder, DiT or SiT .pt file, bundled name or Hub id."""
    out: Path = field(metadata=flag(positional=True))
    """New folder for the result (a new file for pt)."""
    to: Layout = "ldit"
    """Layout to write: ldit, original (Large-DiT), diffusers, or pt (DiT)."""
    dtype: Dtype | Literal["int8"] | None = None
    """Dtype of the written weights (ldit and diffusers); int8 (ldit): matrices in 8 bits, with a scale for each row.
    Default: that of the source."""
    ema_only: bool = False
    """Write only the EMA weights, as the diffusers layout always does."""
    heads: int | None = None
    """Number of attention heads, for a DiT .pt whose size is not one of the published ones."""
    process: Process | None = None
    """Process that a .pt was trained with: ddpm (DiT) or flow (SiT). Default: as its settings or its name say, else
    ddpm."""


@dataclass(frozen=True)
class InfoRequest:
    """Options: which checkpoint is described, and how."""

    source: str = field(metadata=flag(positional=True))
    """Checkpoint: run directory, folder, DiT or SiT .pt file, bundled name or Hub id."""
    json: bool = False
    """Print the description as one JSON object."""
    verify: bool = False
    """Read every file and verify its checksum."""
    heads: int | None = None
    """Number of attention heads, for a DiT .pt whose size is not one of the published ones."""
    process: Process | None = None
    """Process that a .pt was trained with: ddpm (DiT) or flow (SiT). Default: as its settings or its name say, else
    ddpm."""


@dataclass(frozen=True)
class EMARequest:
    """Options: an EMA of any length, reconstructed from the snapshots of a run."""

    run: Path = field(metadata=flag(positional=True))
    """Run directory of a training with --ema.power 0.05 0.10 --ema.snapshot-every N."""
    out: Path = field(metadata=flag(positional=True))
    """New folder for the result."""
    sigma_rel: float
    """Length of the average: standard deviation of its weighting over time, as a fraction of the training time; above 0
    and below 0.28."""
    step: int | None = None
    """Training step at which the average ends, one with a snapshot. Default: the last."""
    dtype: Dtype = "fp32"
    """Dtype of the written weights."""
