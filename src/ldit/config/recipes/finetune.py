"""A recipe that starts from a bundled model and takes any folder of images."""

from dataclasses import replace

from ldit.config.recipes.emoji64 import emoji64_class_xs
from ldit.config.run import RunConfig
from ldit.config.sections import DataConfig, EMAConfig, HeldoutConfig, TrainConfig


def finetune_small() -> RunConfig:
    """Your own images at 64 px, from the bundled 7.9M model: classes, size and schedule follow from them."""
    base = emoji64_class_xs()
    return replace(
        base,
        data=DataConfig("", 64, exif=True, heldout="0.1", fit_model=True),
        train=TrainConfig(
            steps=2000,
            batch_size=32,
            lr=2e-4,
            grad_clip=1.0,
            log_every=50,
            checkpoint_every=250,
            sample_every=250,
            warmup_share=0.05,
            cooldown_share=0.2,
            init_from="emoji64-class-xs",
        ),
        ema=EMAConfig(0.995),
        heldout=HeldoutConfig(every=250, num=256),
    )
