"""Small recipes: a test of all parts in seconds, and a classifier of the user's images."""

from ldit.config.assets import EMOJI_CLASSES
from ldit.config.classifier import ClassifierRun
from ldit.config.presets import preset
from ldit.config.run import RunConfig
from ldit.config.sections import DataConfig, EMAConfig, HeldoutConfig, OptimConfig, TrainConfig
from ldit.config.spec import DDPMConfig, PixelCodecConfig, SamplingConfig


def tiny_cpu() -> RunConfig:
    """A test of all parts in seconds: 16x16 images, under 0.3M parameters, 50 steps."""
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


def extractor_small() -> ClassifierRun:
    """A classifier of your own images, 0.6M parameters at 64 px, as an extractor for evaluation."""
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
