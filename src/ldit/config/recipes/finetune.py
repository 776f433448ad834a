"""Recipes that start from a model and take any folder of images."""

from dataclasses import replace

from ldit.config.model import ClassModelConfig, TextModelConfig
from ldit.config.recipes.emoji64 import emoji64_class_xs
from ldit.config.run import RunConfig
from ldit.config.sections import DataConfig, EMAConfig, HeldoutConfig, ObjectiveConfig, TextConfig, TrainConfig
from ldit.config.spec import FlowConfig, ModelSpec, TextConditionerConfig
from ldit.errors import ConfigError

AUGMENT = 0.15
"""Probability of each kind of augmentation (Karras et al. 2022), for models that are told of it."""


def finetune_small() -> RunConfig:
    """Your own images at 64 px, from the bundled 7.9M model: classes, size and schedule follow from them."""
    return _finetuned(emoji64_class_xs(), "emoji64-class-xs", 2e-4)


def finetune(spec: ModelSpec, source: str) -> RunConfig:
    """The same from the model `source`, whose network, process, codec, text encoder and sampling defaults `spec`
    describes. ConfigError for a text model that does not say what its encoder is."""
    text = TextConfig()
    if isinstance(spec.model, TextModelConfig):
        if not isinstance(spec.conditioner, TextConditionerConfig):
            raise ConfigError(f"{source} does not say what its text encoder is")
        own = spec.conditioner
        text = TextConfig(own.encoder, own.tokenizer or "", own.max_tokens)
    base = RunConfig(
        model=spec.model,
        process=spec.process,
        codec=spec.codec,
        sampling=spec.sampling,
        data=DataConfig("", spec.model.input_size * spec.codec.factor),
        objective=_objective_of(spec),
        text=text,
    )
    return _finetuned(base, source, 1e-4)


def _objective_of(spec: ModelSpec) -> ObjectiveConfig:
    """What a model's network and process need: its own augmentation, and the times of SiT."""
    is_sit = isinstance(spec.process, FlowConfig) and spec.process.is_sit
    objective = ObjectiveConfig(times="uniform") if is_sit else ObjectiveConfig()
    has_labels = isinstance(spec.model, ClassModelConfig) and spec.model.augment_labels
    return replace(objective, augment=AUGMENT) if has_labels else objective


def _finetuned(base: RunConfig, source: str, rate: float) -> RunConfig:
    """Warm-up and cool-down are shares of the steps, so that steps alone can be given."""
    is_text = isinstance(base.model, TextModelConfig)  # captions say left and right, and there are no classes to count
    data = DataConfig("", base.data.image_size, flip=not is_text, exif=True, heldout="0.1", fit_model=not is_text)
    return replace(
        base,
        data=data,
        train=TrainConfig(
            steps=2000,
            batch_size=32,
            lr=rate,
            grad_clip=1.0,
            log_every=50,
            checkpoint_every=250,
            sample_every=250,
            warmup_share=0.05,
            cooldown_share=0.2,
            init_from=source,
        ),
        ema=EMAConfig(0.995),
        heldout=HeldoutConfig(every=250, num=256),
    )
