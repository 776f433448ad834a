"""The sections of a RunConfig. Frozen dataclasses whose fields and docstrings are the command line's flags."""

from dataclasses import dataclass
from typing import Literal

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
Recompute = Literal["none", "selective", "full"]
BadImages = Literal["stop", "skip"]


@dataclass(frozen=True)
class DataConfig:
    """The training images: where they are, and how they are read."""

    path: str = ""
    """The images: the bundled "emoji64", a *.tar file, or a folder. A folder is read as the first of these that it
    contains: a latent cache, IDX files (as MNIST), metadata.jsonl, *.tar files, class folders (in byte order of their
    names), loose images. Hidden files are ignored."""
    image_size: int = 256
    """Side of the square training images, in pixels."""
    flip: bool = True
    """Mirror each image left to right with probability 1/2."""
    heldout: str | None = None
    """File, in the folder of the images, that lists those kept from training: a relative path a line, of tars also
    shard.tar/key.jpg or a bare key. Or a share such as 0.1 of each class, chosen by the images' names and listed in
    RUN/heldout.txt. Default: heldout.txt where there is one; "" = none. IDX files (t10k-*) and latent caches have a
    held-out part of their own: there only "" can be given."""
    max_per_class: int = 0
    """Use at most this many images of each class (balances uneven sets); 0 = all."""
    workers: int = 2
    """Threads that read images in advance; 0 = read in the main thread."""
    bad: BadImages = "stop"
    """What happens at an image that cannot be read: stop = the run ends; skip = the image is left out of its batch and
    recorded in RUN/skipped.jsonl."""
    timeout: float = 25.0
    """Seconds that reading one image may take; then the run ends and names the image."""
    exif: bool = False
    """Apply the EXIF orientation of images. Off as in ADM's preparation of ImageNet."""
    background: tuple[int, int, int] = (255, 255, 255)
    """Colour behind transparent images."""
    max_pixels: int = 1 << 26
    """Most pixels of an image; larger images count as unreadable and are not decoded."""
    codec_precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Dtype in which an autoencoder encodes images during training. On GPUs products in fp32 are rounded to TF32 unless
    train.precision is fp32."""
    verify: bool = True
    """Verify the checksums of a latent cache when the run starts."""
    fit_model: bool = False
    """Give the model as many classes as the images have, and the input size that follows from image_size."""
    buckets: bool = False
    """Keep the aspect of images: each batch has images of one size, of about image_size x image_size pixels and at most
    four times as long as wide."""


@dataclass(frozen=True)
class TrainConfig:
    """Steps, batch, learning rate, precision, and intervals in steps (0 = off)."""

    steps: int = 100_000
    """Optimiser steps of the whole run."""
    batch_size: int = 256
    """Global batch size: images per optimiser step, over all processes."""
    micro_batch_size: int | None = None
    """Images per forward pass of one process; gradients are accumulated. Default: its whole share of the batch."""
    lr: float = 1e-4
    """Peak learning rate, after the warm-up."""
    warmup: int = 0
    """Steps of linear warm-up."""
    schedule: Literal["constant", "cosine", "inverse-sqrt"] = "constant"
    """Learning rate after the warm-up: constant; cosine, down to a hundredth at the last step; inverse-sqrt,
    proportional to sqrt(warmup / step). A cool-down multiplies any of them."""
    seed: int = 0
    """Seed of initial weights, order of images, noise and times."""
    cooldown: int = 0
    """Steps at the end over which the learning rate falls linearly to zero; 0 = none."""
    precision: Precision = "fp32"
    """Dtype of computation; master weights are fp32. fp16 scales the loss."""
    reduce_precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Dtype in which gradients are summed over processes."""
    grad_clip: float = 2.0
    """Gradients are scaled down to at most this norm; 0 = off."""
    log_every: int = 100
    """Steps between log lines."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    sample_every: int = 0
    """Steps between sample grids of the EMA weights."""
    keep: int = 2
    """Number of newest checkpoints to keep; 0 = all."""
    keep_every: int = 0
    """Never remove checkpoints at multiples of this step; 0 = off."""
    async_save: bool = True
    """Write checkpoints in the background; training waits for the copy to host memory only."""
    attention_every: int = 1000
    """Steps between logs of the largest attention logit of each layer."""
    init_from: str = ""
    """Checkpoint to fine-tune: the run starts with its weights where names and shapes match."""
    init_ema: bool = True
    """Of train.init_from use the EMA weights, where it has both kinds."""
    warmup_share: float = 0.0
    """Warm-up as a share of the steps, where warmup is 0; counted once, when the run begins."""
    cooldown_share: float = 0.0
    """Cool-down as a share of the steps, where cooldown is 0."""

    @property
    def warmup_steps(self) -> int:
        return self.warmup or round(self.warmup_share * self.steps)

    @property
    def cooldown_steps(self) -> int:
        return self.cooldown or round(self.cooldown_share * self.steps)


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser and its constants."""

    kind: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon: orthogonalised updates for attention and FFN matrices, AdamW for the rest."""
    momentum: float = 0.95
    """Muon's momentum."""
    beta1: float = 0.9
    """AdamW's decay of the first moment."""
    beta2: float = 0.999
    """AdamW's decay of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    chunked: bool = False
    """Muon: orthogonalise the six parts of an adaLN layer apart, which AdamW trains otherwise, and the three of a joint
    layer of queries, keys and values; matrices of one shape in batches."""
    every: int = 1
    """Muon, chunked: orthogonalise at one of so many steps; the others normalise rows, which is cheaper."""
    precision: Literal["run", "fp32", "bf16"] = "run"
    """Muon: dtype of the iterations; run = fp32 in runs in fp32, else bf16. bf16 is faster on GPUs, and on CPUs with
    AVX-512 bf16."""
    base_width: int = 0
    """AdamW: multiply the rate of each hidden matrix by the number of its inputs at this width over that here (muP), so
    that a rate tuned at this width serves others; 0 = off."""
    moments: Literal["fp32", "bf16", "int8"] = "fp32"
    """How AdamW stores its moments, 8, 4 or 1 bytes a parameter: fp32; bf16, rounded stochastically; int8, the first
    so, and of the second one number for each 128 of a matrix's row. Matrices of other rows, and vectors, keep fp32."""


@dataclass(frozen=True)
class EMAConfig:
    """Moving averages of the weights (EMA)."""

    decay: float = 0.9999
    """Final decay of the average that is sampled and exported."""
    more: tuple[float, ...] = ()
    """Decays of further averages, one for each."""
    power: tuple[float, ...] = ()
    """Relative widths of power-function averages (EDM2). From snapshots of two, such as 0.05 0.10, `ldit ema`
    reconstructs any width afterwards."""
    snapshot_every: int = 0
    """Steps between snapshots of the power averages."""
    warmup: bool = True
    """Let decays warm up: min(decay, (1+n)/(10+n)) at update n = 0, 1, … Without it short runs keep much of their
    initial weights: 61 % of them after 5,000 steps of decay 0.9999."""
    host: bool = False
    """Keep the averages in host memory: 4 bytes a parameter less on the GPU. They are updated while the next step
    computes."""
    every: int = 1
    """Update the averages at one of so many steps, with the decays of them all multiplied. Those of a checkpoint are
    behind by fewer steps than this."""


@dataclass(frozen=True)
class GuardConfig:
    """What happens at non-finite steps and loss spikes. A skipped step is skipped on all ranks, and counts as done."""

    nonfinite: Literal["skip", "stop", "rollback"] = "skip"
    """If loss or gradient is not finite: skip the step, stop, or roll back to the last checkpoint and skip the data
    since."""
    spike: Literal["skip", "stop", "rollback"] = "skip"
    """The same at a loss spike."""
    spike_z: float = 0.0
    """A loss this many standard deviations above its running mean is a spike; 0 = off."""
    limit: int = 10
    """The run ends after this many skipped steps in a row (also of unreadable batches), or rollbacks between two
    checkpoints."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the ranks of torchrun or Slurm share the work: replicate x shard x tp."""

    tp: int = 1
    """Number of ranks that each layer is split over (tensor parallelism)."""
    shard: int = 0
    """Number of ranks that weights, gradients, averages and optimiser state are split over (FSDP2); 0 = all remaining
    ones."""
    replicate: int = 1
    """Number of replicas of the model, each on shard x tp ranks (HSDP)."""
    reshard: bool = True
    """Free gathered weights between the forward and the backward pass: less memory, more communication."""
    recompute: Recompute = "none"
    """Activation checkpointing: none, selective (saves matmuls and attention, recomputes the rest), full."""
    compile: bool = False
    """Compile each block with torch.compile: on by default on GPUs with Triton; on a CPU it needs a C++ compiler."""
    timeout: float = 600.0
    """Seconds without progress after which the run ends and names the stalled rank."""
    eager: bool = False
    """Compile nothing on GPUs either, and update pass by pass."""


@dataclass(frozen=True)
class TrackConfig:
    """Trackers that receive the metrics in addition to metrics.jsonl."""

    tensorboard: bool = False
    """Write TensorBoard files to RUN/tensorboard (needs the package tensorboard)."""
    wandb: str = ""
    """Name of a Weights & Biases project to log to (needs the package wandb)."""
    trackio: str = ""
    """Name of a trackio project to log to (needs the package trackio)."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """Noise times and loss of training. Flow: t = sigmoid(time_mean + time_std·normal), or uniform. DDPM draws its
    indices uniformly."""

    time_mean: float = 0.0
    """Mean before the sigmoid; above 0 = more noise."""
    time_std: float = 1.0
    """Standard deviation before the sigmoid."""
    min_snr: float = 0.0
    """Weigh times so that the squared error of the data counts min(signal-to-noise ratio, this); 5 is usual, 0 = off
    (Hang et al. 2023)."""
    direction: float = 0.0
    """Weight of 1 - cos of predicted and true velocity, over the channels of each place; flow only, 0 = off (Yao et al.
    2025)."""
    nearest_of: int = 1
    """Draw this many noises for each image, and train on the one nearest to it."""
    mid_weight: float = 0.5
    """Weight of the second head's loss, where the model has one (model.mid_layer)."""
    augment: float = 0.0
    """Probability of each kind of augmentation of an image: mirrored, upside down, scaled, rotated, squeezed, shifted.
    The network is told (model.augment_labels); for pixel models."""
    dropout: float = 0.0
    """Share of the updates of attention and FFN that is dropped."""
    route: float = 0.0
    """Share of the image tokens that skip the blocks of route_blocks: cheaper steps for long sequences."""
    route_blocks: tuple[int, int] = (0, 0)
    """First and last of those blocks, counted from 1."""
    times: Literal["logit-normal", "uniform"] = "logit-normal"
    """Distribution of flow's times: logit-normal, by time_mean and time_std; or uniform, as in SiT."""
    loss_weight: Literal["none", "velocity", "likelihood"] = "none"
    """Weight of times where a flow predicts eps or score: SiT's none, velocity or likelihood."""


@dataclass(frozen=True)
class TextConfig:
    """Text models: captions, and the frozen text encoder."""

    encoder: str = "meta-llama/Llama-2-7b-hf"
    """Folder or Hub id of the text encoder, a causal or bidirectional model in transformers' layout."""
    tokenizer: str = ""
    """Folder or Hub id of its tokenizer. Default: the encoder's."""
    max_tokens: int = 128
    """Longer captions are cut to so many tokens."""
    dropout: float = 0.1
    """Share of captions that training replaces by the empty one; 0 = no guidance."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Dtype in which the encoder computes."""
    cache: str = ""
    """Folder with features of all captions, made by `ldit encode --text`; with a complete one the encoder is not
    needed."""
    prompts: tuple[str, ...] = ()
    """Prompts of the sample grids during training, with fixed seeds. Default: captions of the data."""
    offload: bool = False
    """Keep the encoder's layers in host memory and stream them to the GPU: a 7B language model then needs less than a
    gigabyte there."""


@dataclass(frozen=True)
class StageConfig:
    """The first steps of a run, at a smaller image size."""

    size: int
    """Side of the images in pixels; divides data.image_size."""
    steps: int
    """Number of steps."""
    shift: float | None = None
    """Shift of the noise times in this stage, flow only; below 1 = less noise. Default: that of the process."""


@dataclass(frozen=True)
class EvalConfig:
    """Fréchet distance of samples of the EMA weights to real images during training; the best step is kept."""

    every: int = 0
    """Steps between evaluations."""
    num: int = 1000
    """Number of samples, spread evenly over the classes."""
    reference: str = ""
    """Statistics (of `ldit stats`) or images to compare with. Default: up to 50,000 training images."""
    extractor: str = "inception"
    """Network for the features: inception, efficientnet-lite0, or the run directory of a classifier."""
    inception_weights: str = ""
    """File of Inception's weights. Default: the file that LDIT_INCEPTION_WEIGHTS names, else one in the cache of
    torch.hub or Hugging Face."""
    batch_size: int = 50
    """Images that one process samples at once."""
    protocol: Literal["", "adm", "torch-fidelity", "pytorch-fid", "clean-fid"] = ""
    """How images are resized and scaled for Inception, as in `ldit evaluate`. Default: adm."""


@dataclass(frozen=True)
class HeldoutConfig:
    """Loss of the EMA weights on held-out images, with fixed noise, by range of noise time."""

    every: int = 0
    """Steps between measurements."""
    num: int = 256
    """Number of images, spread over the held-out set."""
