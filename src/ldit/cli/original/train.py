"""The original's train.py, for class and text models: its flags and defaults as a run of ours."""

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ldit.cli.arguments import parse
from ldit.config.model import ModelConfig
from ldit.config.presets import preset, text_preset
from ldit.config.run import RunConfig
from ldit.config.sections import DataConfig, OptimConfig, ParallelConfig, TextConfig, TrainConfig
from ldit.config.spec import AutoencoderConfig, CodecConfig, DDPMConfig, PixelCodecConfig
from ldit.errors import ConfigError, LditError


@dataclass(frozen=True)
class OriginalTrainArguments:
    """Train a Large-DiT with the original's flags and defaults, a text model with --lm or a YAML file of lists. Rerun
    the same command to resume. `ldit train` has more flags."""

    model: str
    """DiT_Llama_600M_patch2, DiT_Llama_3B_patch2, DiT_Llama_7B_patch2, or one of ours: XS, S, B, L."""
    data_path: str
    """Folder of class folders; for a text model a YAML file that names lists of images, or any captioned set."""
    results_dir: Path
    """Directory of the run."""
    image_size: int = 256
    """256 or 512; with --vae pixels any even number."""
    num_classes: int = 1000
    global_batch_size: int = 256
    micro_batch_size: int = 1
    """Images per forward pass of one process."""
    lr: float = 1e-4
    wd: float = 0.0
    """Weight decay."""
    grad_clip: float = 2.0
    max_steps: int = 100_000
    ckpt_every: int = 50_000
    log_every: int = 100
    precision: Literal["fp32", "tf32", "fp16", "bf16"] = "bf16"
    grad_precision: Literal["fp32", "tf32", "fp16", "bf16"] | None = None
    """Dtype in which gradients are summed over processes. Default: that of --precision."""
    global_seed: int = 0
    vae: Literal["ema", "mse", "pixels"] = "ema"
    """stabilityai/sd-vae-ft-ema or -mse; pixels = RGB without an autoencoder."""
    local_diffusers_model_root: Path | None = None
    """Folder that holds stabilityai/sd-vae-ft-ema."""
    num_workers: int = 4
    """Threads that read images in advance."""
    data_parallel: Literal["sdp", "fsdp", "hsdp"] = "fsdp"
    """How weights, gradients and optimiser state are split: fsdp and sdp over all processes (sdp keeps gathered weights
    until the backward pass), hsdp over those of a node."""
    qk_norm: bool = False
    """Normalise queries and keys."""
    auto_resume: bool = True
    """Continue from the newest step in --results_dir; with --no_auto_resume there must be none."""
    resume: Path | None = None
    """Step to continue from; it must be the newest in --results_dir."""
    init_from: Path | None = None
    """Checkpoint to fine-tune: the run starts with its weights (not EMA)."""
    lm: str | None = None
    """Text models: folder or Hub id of the frozen language model. Default: that of --tokenizer_path."""
    tokenizer_path: str | None = None
    """Text models: folder or Hub id of its tokenizer. Default: meta-llama/Llama-2-7b-hf, or that of --lm."""
    caption_dropout_prob: float = 0.1
    """Text models: share of captions replaced by the empty one."""
    max_text_tokens: int = 128
    """Text models: longer captions are cut."""
    rope_scaling_factor: float = 1.0
    """Text models: rotary positions are divided by this."""
    model_parallel_size: int = 1
    """Number of processes that each layer is split over."""
    master_port: int | None = None
    """Port at which the processes connect. Default: torchrun's choice, or a port derived from the Slurm job's id."""


# Configuration key, or flag of `ldit train`, in messages -> flag of train.py.
_NAMES = {
    "--out": "--results_dir",
    "--data.path": "--data_path",
    "--model.num_classes": "--num_classes",
    "data.path": "--data_path",
    "data.image_size": "--image_size",
    "data.workers": "--num_workers",
    "model.num_classes": "--num_classes",
    "train.steps": "--max_steps",
    "train.batch_size": "--global_batch_size",
    "train.micro_batch_size": "--micro_batch_size",
    "train.lr": "--lr",
    "train.seed": "--global_seed",
    "train.precision": "--precision",
    "train.reduce_precision": "--grad_precision",
    "train.grad_clip": "--grad_clip",
    "train.log_every": "--log_every",
    "train.checkpoint_every": "--ckpt_every",
    "train.init_from": "--init_from",
    "optim.weight_decay": "--wd",
    "text.encoder": "--lm",
    "text.dropout": "--caption_dropout_prob",
    "text.max_tokens": "--max_text_tokens",
    "model.rope_scaling_factor": "--rope_scaling_factor",
    "parallel.tp": "--model_parallel_size",
}
_NAME = re.compile(r"(?<![\w./-])(" + "|".join(map(re.escape, _NAMES)) + r")(?![\w/-]|\.\w)")


def run(arguments: list[str]) -> int:
    """Train with the original's flags; errors name these flags. Returns the exit code."""
    try:
        return _run(parse(OriginalTrainArguments, arguments, "train.py"))
    except LditError as error:
        renamed = type(error)(_NAME.sub(lambda match: _NAMES[match[0]], str(error)))
        renamed.said_elsewhere = error.said_elsewhere
        raise renamed from error


def _run(args: OriginalTrainArguments) -> int:
    config = run_config(args)
    if args.master_port is not None:
        os.environ.setdefault("MASTER_PORT", str(args.master_port))  # torchrun has chosen one already
    from ldit.commands.original_run import check_start
    from ldit.commands.train import run as train
    from ldit.log import setup

    setup()
    check_start(args.results_dir, args.auto_resume, args.resume)
    return train(config, args.results_dir)


def run_config(args: OriginalTrainArguments) -> RunConfig:
    """The configuration for these flags; ConfigError names a flag whose value is not supported."""
    # The codec says how many pixels a latent has, and which image sizes are possible.
    codec = _codec(args)
    pixels = isinstance(codec, PixelCodecConfig)
    sides = "any even number" if pixels else "256 or 512"
    if args.image_size % 2 or args.image_size < 2 or not (pixels or args.image_size in (256, 512)):
        raise ConfigError(f"--image_size: expected {sides} with --vae {args.vae}, got {args.image_size}")
    # The other flags are sections' fields under another name.
    reduce = args.grad_precision or args.precision
    return RunConfig(
        model=_model(args, codec),
        process=DDPMConfig(),
        codec=codec,
        data=_data(args),
        text=_text(args),
        train=TrainConfig(
            steps=args.max_steps,
            batch_size=args.global_batch_size,
            micro_batch_size=args.micro_batch_size,
            lr=args.lr,
            seed=args.global_seed,
            precision=args.precision,
            reduce_precision="fp32" if reduce == "tf32" else reduce,
            grad_clip=args.grad_clip,
            log_every=args.log_every,
            checkpoint_every=args.ckpt_every,
            keep=0,  # the original removes none
            init_from="" if args.init_from is None else str(args.init_from),
            init_ema=False,
        ),
        optim=OptimConfig(weight_decay=args.wd),
        parallel=replace(_parallel(args.data_parallel), tp=args.model_parallel_size),
    )


def is_text(args: OriginalTrainArguments) -> bool:
    """Whether the flags are of the original's text models."""
    return bool(args.lm or args.tokenizer_path) or Path(args.data_path).suffix.lower() in (".yaml", ".yml")


def _model(args: OriginalTrainArguments, codec: CodecConfig) -> ModelConfig:
    side, channels = args.image_size // codec.factor, 3 if isinstance(codec, PixelCodecConfig) else 4
    if not is_text(args):
        return preset(
            args.model, input_size=side, in_channels=channels, num_classes=args.num_classes, qk_norm=args.qk_norm
        )
    from ldit.commands.original_run import text_width

    # Tokens of the tallest bucket: the original's own default holds those of 256 pixels.
    rows = side // 2
    return text_preset(
        args.model,
        in_channels=channels,
        qk_norm=args.qk_norm,
        max_seq_len=rows * rows + 2 * rows,
        cap_feat_dim=text_width(_text(args).encoder),
        rope_scaling_factor=args.rope_scaling_factor,
    )


def _data(args: OriginalTrainArguments) -> DataConfig:
    """Text models have aspect buckets, and mirror no image: captions say left and right."""
    text = is_text(args)
    return DataConfig(args.data_path, args.image_size, flip=not text, workers=args.num_workers, buckets=text)


def _text(args: OriginalTrainArguments) -> TextConfig:
    if not is_text(args):
        for name in ("caption_dropout_prob", "max_text_tokens", "rope_scaling_factor"):
            if getattr(args, name) != getattr(OriginalTrainArguments, name):
                raise ConfigError(f"--{name}: is for text models (--lm)")
        return TextConfig()
    encoder = args.lm or args.tokenizer_path or TextConfig.encoder
    tokenizer = "" if args.tokenizer_path in (None, encoder) else args.tokenizer_path
    precision: Any = args.precision if args.precision != "tf32" else "fp32"
    return TextConfig(encoder, tokenizer or "", args.max_text_tokens, args.caption_dropout_prob, precision)


def _codec(args: OriginalTrainArguments) -> CodecConfig:
    root = args.local_diffusers_model_root
    if args.vae == "pixels":
        if root is not None:
            raise ConfigError("--local_diffusers_model_root: --vae pixels has no autoencoder")
        return PixelCodecConfig()
    name = f"stabilityai/sd-vae-ft-{args.vae}"
    if root is None:
        return AutoencoderConfig(name)
    if not (root / name).is_dir():
        raise ConfigError(f"--local_diffusers_model_root: there is no folder {root / name}")
    return AutoencoderConfig(str(root / name))


def _parallel(kind: str) -> ParallelConfig:
    if kind != "hsdp":
        return ParallelConfig(reshard=kind == "fsdp")
    processes, nodes = _processes()
    if processes % nodes:
        raise ConfigError(
            f"--data_parallel hsdp: {processes} processes are not the same number on each of {nodes} nodes"
        )
    return ParallelConfig(replicate=nodes, shard=processes // nodes)


def _processes() -> tuple[int, int]:
    """(processes, nodes) from the variables of torchrun or srun; (1, 1) without either."""
    if "WORLD_SIZE" in os.environ:
        world = _count("WORLD_SIZE", 1)
        local = _count("LOCAL_WORLD_SIZE", world)
        if world % local:
            raise ConfigError(f"LOCAL_WORLD_SIZE: {local} does not divide WORLD_SIZE {world}")
        return world, world // local
    if "SLURM_PROCID" in os.environ:
        return _count("SLURM_STEP_NUM_TASKS", 1), _count("SLURM_STEP_NUM_NODES", 1)
    return 1, 1


def _count(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{name}: expected a number of processes, got {text!r}")
    return int(text)
