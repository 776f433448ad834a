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
    """Options: a checkpoint in another layout."""

    source: str = field(metadata=flag(positional=True))
    """Folder, run, DiT .pt file, bundled name or Hub id."""
    out: Path = field(metadata=flag(positional=True))
    """Folder (a file for pt) that does not exist yet."""
    to: Layout = "ldit"
    """Target layout."""
    dtype: Dtype | None = None
    """Dtype of the weights written (ldit and diffusers). Default: as they are."""
    ema_only: bool = False
    """Write the EMA weights as the only ones, as diffusers always has them."""
    heads: int | None = None
    """Attention heads of a DiT .pt of an unlisted size."""
    process: Process | None = None
    """What a .pt was trained as: ddpm = DiT, flow = SiT. Default: what its settings or its name say, else ddpm."""


@dataclass(frozen=True)
class InfoRequest:
    """Options: a checkpoint to describe."""

    source: str = field(metadata=flag(positional=True))
    """Folder, run, DiT .pt file, bundled name or Hub id."""
    json: bool = False
    """One JSON object."""
    verify: bool = False
    """Read and check every file."""
    heads: int | None = None
    """Attention heads of a DiT .pt of an unlisted size."""
    process: Process | None = None
    """What a .pt was trained as: ddpm = DiT, flow = SiT. Default: what its settings or its name say, else ddpm."""


@dataclass(frozen=True)
class EMARequest:
    """Options: an EMA of any length, reconstructed from the snapshots of a run."""

    run: Path = field(metadata=flag(positional=True))
    """Run trained with --ema.power 0.05 0.10 --ema.snapshot-every N."""
    out: Path = field(metadata=flag(positional=True))
    """Folder that does not exist yet."""
    sigma_rel: float
    """Relative width of the average: its deviation in time as a share of the training, above 0 and below 0.28."""
    step: int | None = None
    """Step of the snapshot at which the average ends. Default: the last."""
    dtype: Dtype = "fp32"
    """Dtype of the weights written."""
