"""Recipes: registered functions that return a whole RunConfig. `ldit train NAME` starts one; every field is a flag."""

import json
from collections.abc import Callable
from typing import TypeVar

from ldit.config.assets import ASSETS
from ldit.config.autoencoder import AutoencoderModelConfig, AutoencoderRun
from ldit.config.base_run import BaseRun
from ldit.config.classifier import ClassifierRun
from ldit.config.model import preset
from ldit.config.run import RunConfig
from ldit.config.sections import DataConfig, EMAConfig, HeldoutConfig, ObjectiveConfig, OptimConfig, TrainConfig
from ldit.config.spec import AutoencoderConfig, DDPMConfig, FlowConfig, PixelCodecConfig, SamplingConfig
from ldit.errors import ConfigError

EMOJI_CLASSES = 9

_Run = TypeVar("_Run", bound=BaseRun)

RECIPES: dict[str, Callable[[], BaseRun]] = {}


def recipe(name: str) -> BaseRun:
    """The configuration of a registered recipe."""
    if name not in RECIPES:
        raise ConfigError(f"unknown recipe {name!r} (known: {', '.join(RECIPES)})")
    return RECIPES[name]()


def diffusion_recipe(name: str) -> RunConfig:
    """The configuration of a recipe that trains a diffusion model; ConfigError for another."""
    config = recipe(name)
    if not isinstance(config, RunConfig):
        raise ConfigError(f"recipe {name!r} trains no diffusion model")
    return config


def _register(name: str) -> Callable[[Callable[[], _Run]], Callable[[], _Run]]:
    def register(function: Callable[[], _Run]) -> Callable[[], _Run]:
        RECIPES[name] = function
        return function

    return register


def _emoji(model: str, patch: int, train: TrainConfig, ema: float) -> RunConfig:
    """Flow matching in pixel space with data prediction (JiT): 64x64 RGB, nine classes."""
    return RunConfig(
        model=preset(
            model,
            input_size=64,
            patch_size=patch,
            in_channels=3,
            num_classes=EMOJI_CLASSES,
            learn_sigma=False,
            qk_norm=True,
            rope="2d",
        ),
        process=FlowConfig(prediction="x0"),
        codec=PixelCodecConfig(),
        sampling=SamplingConfig("unipc2", 20, 3.0, "all", (0.4, 1.0), "karras"),  # docs/solvers.md
        data=DataConfig("emoji64", 64, flip=False, max_per_class=300),
        train=train,
        optim=OptimConfig(beta2=0.95),
        ema=EMAConfig(ema),
        objective=ObjectiveConfig(time_mean=0.8, time_std=0.8),
        heldout=HeldoutConfig(every=100, num=256),
    )


@_register("emoji64-class-xs")
def emoji64_class_xs() -> RunConfig:
    """The bundled model: 7.9M parameters, trains on two CPU cores."""
    train = TrainConfig(
        steps=7400,
        batch_size=64,
        lr=5e-4,
        warmup=200,
        cooldown=1600,
        grad_clip=1.0,
        log_every=50,
        checkpoint_every=250,
        sample_every=1000,
    )
    return _emoji("XS", 8, train, 0.999)


@_register("emoji64-class-s")
def emoji64_class_s() -> RunConfig:
    """33M parameters over 256 tokens, for one GPU."""
    train = TrainConfig(
        steps=60_000,
        batch_size=256,
        lr=3e-4,
        warmup=1000,
        schedule="cosine",
        precision="bf16",
        grad_clip=1.0,
        checkpoint_every=2000,
        sample_every=5000,
    )
    return _emoji("S", 4, train, 0.9995)


@_register("emoji64-vae")
def emoji64_vae() -> AutoencoderRun:
    """The bundled autoencoder: 64x64 RGB to 4x16x16 latents, trains on two CPU cores."""
    return AutoencoderRun(
        model=AutoencoderModelConfig(4, (32, 64, 96), 1, 8, mid_block_attention=False),
        data=DataConfig("emoji64", 64),
        train=TrainConfig(
            steps=8000,
            batch_size=16,
            lr=1e-3,
            warmup=200,
            cooldown=1000,
            precision="bf16",
            grad_clip=1.0,
            log_every=50,
            checkpoint_every=250,
            sample_every=1000,
            attention_every=0,
        ),
        optim=OptimConfig(beta2=0.99),
        ema=EMAConfig(0.998),
        heldout=HeldoutConfig(every=500, num=256),
    )


@_register("emoji64-latent-s")
def emoji64_latent_s() -> RunConfig:
    """33M parameters over the 64 tokens of the bundled autoencoder's latents."""
    return RunConfig(
        model=preset("S", input_size=16, num_classes=EMOJI_CLASSES, learn_sigma=False, qk_norm=True, rope="2d"),
        process=FlowConfig(),
        codec=_bundled_codec("emoji64-vae"),
        sampling=SamplingConfig("heun", 20, 3.0, "all"),
        data=DataConfig("emoji64", 64, flip=False, max_per_class=300),
        train=TrainConfig(
            steps=60_000,
            batch_size=256,
            lr=3e-4,
            warmup=1000,
            schedule="cosine",
            precision="bf16",
            grad_clip=1.0,
            log_every=50,
            checkpoint_every=2000,
            sample_every=5000,
        ),
        optim=OptimConfig(beta2=0.95),
        ema=EMAConfig(0.9995),
        heldout=HeldoutConfig(every=500, num=256),
    )


def _bundled_codec(name: str) -> AutoencoderConfig:
    """A bundled autoencoder, with the scale and shift that its own config.json states."""
    stated = json.loads((ASSETS / "models" / name / "config.json").read_text(encoding="utf-8"))
    factor = 1 << (len(stated["block_out_channels"]) - 1)
    return AutoencoderConfig(name, stated["scaling_factor"], stated["shift_factor"], factor)


@_register("extractor-small")
def extractor_small() -> ClassifierRun:
    """A classifier of your own pictures, 0.6M parameters at 64 px: an extractor of evaluation."""
    return ClassifierRun(
        data=DataConfig("", 64),
        train=TrainConfig(
            steps=2000,
            batch_size=64,
            lr=3e-3,
            warmup=200,
            schedule="cosine",
            grad_clip=1.0,
            log_every=50,
            checkpoint_every=500,
            attention_every=0,
        ),
        optim=OptimConfig(beta2=0.99, weight_decay=0.05),
        ema=EMAConfig(0.99),
        heldout=HeldoutConfig(every=250, num=1000),
    )


@_register("tiny-cpu")
def tiny_cpu() -> RunConfig:
    """A test of the whole path in seconds: 16x16 pictures, under 0.3M parameters, 50 steps."""
    return RunConfig(
        model=preset(
            "XS",
            dim=64,
            n_layers=2,
            multiple_of=32,
            input_size=16,
            patch_size=4,
            in_channels=3,
            num_classes=EMOJI_CLASSES,
            qk_norm=True,
        ),
        process=DDPMConfig(),
        codec=PixelCodecConfig(),
        sampling=SamplingConfig("ddim", 10, 1.5, "all"),
        data=DataConfig("emoji64", 16, flip=False, max_per_class=20),
        train=TrainConfig(steps=50, batch_size=16, lr=1e-3, log_every=10, checkpoint_every=25, sample_every=50),
        ema=EMAConfig(0.99),
        heldout=HeldoutConfig(every=50, num=32),
    )


def _imagenet(model: str, image_size: int, batch: int, micro: int) -> RunConfig:
    """The original's settings: DDPM, AdamW 1e-4, EMA 0.9999, clip 2.0, bf16, q/k norm, 3M steps."""
    return RunConfig(
        model=preset(model, input_size=image_size // 8, qk_norm=True),
        process=DDPMConfig(),
        codec=AutoencoderConfig(),
        data=DataConfig("", image_size),
        train=TrainConfig(
            steps=3_000_000,
            batch_size=batch,
            micro_batch_size=micro,
            lr=1e-4,
            precision="bf16",
            grad_clip=2.0,
            checkpoint_every=10_000,
        ),
    )


@_register("imagenet256-600m")
def imagenet256_600m() -> RunConfig:
    """Large-DiT 600M at 256 px."""
    return _imagenet("DiT_Llama_600M_patch2", 256, 256, 32)


@_register("imagenet256-3b")
def imagenet256_3b() -> RunConfig:
    """Large-DiT 3B at 256 px."""
    return _imagenet("DiT_Llama_3B_patch2", 256, 256, 32)


@_register("imagenet256-7b")
def imagenet256_7b() -> RunConfig:
    """Large-DiT 7B at 256 px, batch 512."""
    return _imagenet("DiT_Llama_7B_patch2", 256, 512, 32)


@_register("imagenet512-3b")
def imagenet512_3b() -> RunConfig:
    """Large-DiT 3B at 512 px."""
    return _imagenet("DiT_Llama_3B_patch2", 512, 256, 8)
