"""The original's recipes: Large-DiT 600M, 3B and 7B on ImageNet."""

from ldit.config.presets import preset
from ldit.config.run import RunConfig
from ldit.config.sections import DataConfig, ParallelConfig, TrainConfig
from ldit.config.spec import AutoencoderConfig, DDPMConfig


def _imagenet(model: str, image_size: int, batch: int, micro: int, reshard: bool = False) -> RunConfig:
    """The original's settings: DDPM, AdamW 1e-4, EMA 0.9999, clip 2.0, bf16, q/k norm, 3M steps. Gathered weights are
    freed between the passes (`reshard`) where they take much of the memory."""
    return RunConfig(
        model=preset(model, input_size=image_size // 8, qk_norm=True),
        process=DDPMConfig(),
        codec=AutoencoderConfig(),
        data=DataConfig("", image_size, workers=4),
        train=TrainConfig(
            steps=3_000_000,
            batch_size=batch,
            micro_batch_size=micro,
            lr=1e-4,
            precision="bf16",
            grad_clip=2.0,
            checkpoint_every=10_000,
        ),
        parallel=ParallelConfig(reshard=reshard),
    )


def imagenet256_600m() -> RunConfig:
    """Large-DiT 600M at 256 px."""
    return _imagenet("DiT_Llama_600M_patch2", 256, 256, 32)


def imagenet256_3b() -> RunConfig:
    """Large-DiT 3B at 256 px."""
    return _imagenet("DiT_Llama_3B_patch2", 256, 256, 32)


def imagenet256_7b() -> RunConfig:
    """Large-DiT 7B at 256 px, batch 512."""
    return _imagenet("DiT_Llama_7B_patch2", 256, 512, 32, reshard=True)


def imagenet512_3b() -> RunConfig:
    """Large-DiT 3B at 512 px."""
    return _imagenet("DiT_Llama_3B_patch2", 512, 256, 8)
