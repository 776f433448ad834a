"""The original DiT and SiT on ImageNet, as published."""

from ldit.config.presets import original_dit
from ldit.config.run import RunConfig
from ldit.config.sections import DataConfig, EMAConfig, ObjectiveConfig, TrainConfig
from ldit.config.spec import SIT, AutoencoderConfig, DDPMConfig, ProcessConfig


def _imagenet(size: str, process: ProcessConfig, objective: ObjectiveConfig) -> RunConfig:
    """AdamW 1e-4 without decay, batch 256, EMA 0.9999 from the first step, no clipping, TF32 products."""
    return RunConfig(
        model=original_dit(size),
        process=process,
        codec=AutoencoderConfig(),
        data=DataConfig("", 256),
        train=TrainConfig(
            steps=400_000,
            batch_size=256,
            lr=1e-4,
            precision="tf32",
            grad_clip=0.0,
            checkpoint_every=10_000,
        ),
        ema=EMAConfig(0.9999, warmup=False),
        objective=objective,
    )


def dit_xl_2() -> RunConfig:
    """The original DiT-XL/2 at 256 px, 675M parameters."""
    return _imagenet("XL", DDPMConfig(), ObjectiveConfig())


def dit_s_2() -> RunConfig:
    """The original DiT-S/2 at 256 px, 33M parameters."""
    return _imagenet("S", DDPMConfig(), ObjectiveConfig())


def sit_xl_2() -> RunConfig:
    """SiT-XL/2 at 256 px: DiT-XL/2 as a flow, with uniform times."""
    return _imagenet("XL", SIT, ObjectiveConfig(times="uniform"))
