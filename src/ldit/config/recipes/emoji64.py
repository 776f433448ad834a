"""Recipes on the bundled emoji64: class models in pixels and latents, a text model, and their autoencoder."""

import json

from ldit.config.assets import ASSETS, EMOJI_CLASSES
from ldit.config.autoencoder import AutoencoderModelConfig, AutoencoderRun
from ldit.config.presets import preset, text_preset
from ldit.config.run import RunConfig
from ldit.config.sections import (
    DataConfig,
    EMAConfig,
    HeldoutConfig,
    ObjectiveConfig,
    OptimConfig,
    TextConfig,
    TrainConfig,
)
from ldit.config.spec import AutoencoderConfig, FlowConfig, PixelCodecConfig, SamplingConfig


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
        sampling=SamplingConfig("ab4", 20, 3.0, "all", (0.4, 1.0), "karras"),  # docs/solvers.md
        data=DataConfig("emoji64", 64, flip=False, max_per_class=300),
        train=train,
        optim=OptimConfig(beta2=0.95),
        ema=EMAConfig(ema),
        objective=ObjectiveConfig(time_mean=0.8, time_std=0.8),
        heldout=HeldoutConfig(every=100, num=256),
    )


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
    """A bundled autoencoder, with the scale and shift in its own config.json."""
    config = json.loads((ASSETS / "models" / name / "config.json").read_text(encoding="utf-8"))
    factor = 1 << (len(config["block_out_channels"]) - 1)
    return AutoencoderConfig(name, config["scaling_factor"], config["shift_factor"], factor)


def emoji64_text() -> RunConfig:
    """The bundled text model: 6.9M parameters, prompts to emoji in four styles, trains on two CPU cores."""
    return RunConfig(
        model=text_preset(
            "XS",
            max_seq_len=72,  # 8 rows of 8 patches, each with a token at its end
            cap_feat_dim=384,
            n_layers=7,
            n_kv_heads=2,
            multiple_of=64,
            learn_sigma=False,
            qk_norm=True,
            rope="2d",
            shared_adaln=True,
        ),
        process=FlowConfig(),
        codec=_bundled_codec("emoji64-vae"),
        sampling=SamplingConfig("ab4", 20, 3.0, "all", grid="karras"),
        data=DataConfig("emoji64-styles", 64, flip=False),
        train=TrainConfig(
            steps=20_000,
            batch_size=64,
            lr=4e-3,
            warmup=200,
            cooldown=4000,
            precision="bf16",
            grad_clip=1.0,
            log_every=50,
            checkpoint_every=250,
            sample_every=1000,
        ),
        optim=OptimConfig(kind="muon", beta2=0.95, chunked=True),
        ema=EMAConfig(0.999),
        heldout=HeldoutConfig(every=500, num=256),
        text=TextConfig("sentence-transformers/all-MiniLM-L6-v2", max_tokens=32),
    )
