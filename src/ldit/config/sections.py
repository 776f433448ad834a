"""The sections of a RunConfig. Frozen dataclasses whose fields and docstrings are the command line's flags."""

from dataclasses import dataclass
from typing import Literal

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
Recompute = Literal["none", "selective", "full"]
BadImages = Literal["stop", "skip"]


@dataclass(frozen=True)
class DataConfig:
    """Where the images are and how they are cut."""

    path: str = ""
    """The images: the bundled "emoji64", a *.tar file, or a folder with one of these, the first that is there: a
    latent cache, IDX files (MNIST kind), metadata.jsonl, *.tar files, class folders (classes in byte order), loose
    images. Hidden files are ignored."""
    image_size: int = 256
    """Side of the square training images, in pixels."""
    flip: bool = True
    """Mirror half of the images."""
    heldout: str | None = None
    """List, in the folder of the images, of those kept from training, one relative path a line, of tars also
    shard.tar/key.jpg or a bare key; default heldout.txt where there is one, "" = none. IDX files have t10k-* instead, a
    latent cache what it was made with: "" alone may be given there."""
    max_per_class: int = 0
    """Use at most this many images of a class, 0 = all (evens out lopsided sets)."""
    workers: int = 2
    """Threads that prefetch images; 0 = read in the main thread."""
    bad: BadImages = "stop"
    """What happens at an image that cannot be read: the run ends, or the image is left out of its batch, with a line in
    RUN/skipped.jsonl."""
    timeout: float = 25.0
    """Seconds that reading one image may take; then the run ends and names the image."""
    exif: bool = False
    """Apply the EXIF orientation of images; off, as in ADM's ImageNet."""
    background: tuple[int, int, int] = (255, 255, 255)
    """Colour behind transparent images."""
    max_pixels: int = 1 << 26
    """Largest image in pixels; larger ones count as unreadable and are not decoded."""
    codec_precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Dtype in which an autoencoder encodes images during training."""
    verify: bool = True
    """Verify the checksums of a latent cache at the start."""


@dataclass(frozen=True)
class TrainConfig:
    """Steps, batch, learning rate, precision, and intervals in steps (0 = off)."""

    steps: int = 100_000
    """Optimiser steps of the whole run."""
    batch_size: int = 256
    """Global batch size."""
    micro_batch_size: int | None = None
    """Samples of one forward pass of one process; default its whole share of the batch."""
    lr: float = 1e-4
    """Peak learning rate."""
    warmup: int = 0
    """Steps of linear warm-up."""
    schedule: Literal["constant", "cosine", "inverse-sqrt"] = "constant"
    """Learning rate after the warm-up; cosine falls to a hundredth at the last step, inverse-sqrt as
    sqrt(warmup / step)."""
    seed: int = 0
    """Seed of weights, order, noise and times."""
    cooldown: int = 0
    """Steps at the end over which the learning rate falls linearly to zero."""
    precision: Precision = "fp32"
    """Dtype of computation; master weights are fp32. fp16 scales the loss."""
    reduce_precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Dtype in which gradients are summed over processes."""
    grad_clip: float = 2.0
    """Largest gradient norm, 0 = off."""
    log_every: int = 100
    """Steps between log lines."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    sample_every: int = 0
    """Steps between sample grids of the EMA weights."""
    keep: int = 2
    """Newest checkpoints that are kept; 0 = all."""
    keep_every: int = 0
    """Checkpoints at multiples of this step are kept for good."""
    async_save: bool = True
    """Write checkpoints in the background; training waits for the copy to host memory only."""
    attention_every: int = 1000
    """Steps between logs of the largest attention logit of each layer."""
    init_from: str = ""
    """Checkpoint whose matching weights the run starts with."""
    init_ema: bool = True
    """Start from its EMA weights, where kept apart."""


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser."""

    kind: Literal["adamw", "muon"] = "adamw"
    """muon: orthogonalised updates for attention and FFN matrices, AdamW for the rest."""
    momentum: float = 0.95
    """Muon's momentum."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""


@dataclass(frozen=True)
class EMAConfig:
    """Moving averages of the weights: decay min(decay, (1+n)/(10+n)) at update n = 0, 1, …"""

    decay: float = 0.9999
    """Decay after the warm-up, of the average that is sampled and exported."""
    more: tuple[float, ...] = ()
    """Further decays, each its own average."""
    power: tuple[float, ...] = ()
    """Relative widths of power-function averages (EDM2); snapshots of two, such as 0.05 0.10, give any width
    afterwards (`ldit ema`)."""
    snapshot_every: int = 0
    """Steps between snapshots of the power averages."""


@dataclass(frozen=True)
class GuardConfig:
    """Non-finite steps and loss spikes. Such a step is skipped on all ranks, and counts as done."""

    nonfinite: Literal["skip", "stop", "rollback"] = "skip"
    """Loss or gradient not finite: skip the step, stop, or roll back to the last checkpoint and skip its data."""
    spike: Literal["skip", "stop", "rollback"] = "skip"
    """The same for a loss spike."""
    spike_z: float = 0.0
    """A loss this many deviations above its running mean is a spike, 0 = never."""
    limit: int = 10
    """Skipped steps in a row (unreadable batches too), or rollbacks between two checkpoints, that end the run."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the ranks of torchrun or Slurm share the work: replicate x shard x tp."""

    tp: int = 1
    """Ranks that share every layer (tensor parallelism)."""
    shard: int = 0
    """Ranks that share weights, gradients, averages and optimiser state (FSDP2); 0 = all that are left."""
    replicate: int = 1
    """Replicas of the model, each over shard x tp ranks (HSDP)."""
    reshard: bool = True
    """Free gathered weights between forward and backward pass."""
    recompute: Recompute = "none"
    """Activation checkpointing: none, selective (saves matmuls and attention, recomputes the rest), full."""
    compile: bool = False
    """Compile each block (needs a C++ compiler on the CPU)."""
    timeout: float = 600.0
    """Seconds without progress after which the run ends and the stalled rank is named."""


@dataclass(frozen=True)
class TrackConfig:
    """Where metrics go besides metrics.jsonl."""

    tensorboard: bool = False
    """Event files in RUN/tensorboard (needs the package tensorboard)."""
    wandb: str = ""
    """Weights & Biases project (needs the package wandb)."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """Flow times: t = sigmoid(mean + std·normal). DDPM draws its indices uniformly."""

    time_mean: float = 0.0
    """Mean before the sigmoid; above 0 = noisier."""
    time_std: float = 1.0
    """Deviation before the sigmoid."""


@dataclass(frozen=True)
class EvalConfig:
    """Distance of samples of the EMA weights to real images during training; the best step is kept."""

    every: int = 0
    """Steps between evaluations."""
    num: int = 1000
    """Samples, as many of each class."""
    reference: str = ""
    """Statistics (`ldit stats`) or images they are compared with; default up to 50,000 training images."""
    extractor: str = "inception"
    """inception, efficientnet-lite0, or the run of a classifier."""
    inception_weights: str = ""
    """The file of Inception's weights; default where LDIT_INCEPTION_WEIGHTS says, or a cache."""
    batch_size: int = 50
    """Images sampled together by one process."""


@dataclass(frozen=True)
class HeldoutConfig:
    """Loss on held-out images with fixed noise, by time bucket."""

    every: int = 0
    """Steps between measurements of the EMA weights."""
    num: int = 256
    """Images, spread over the held-out set."""
