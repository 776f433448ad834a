"""What captions, aspect buckets and cascades need of a run's configuration: ConfigError names the key."""

from typing import TYPE_CHECKING

from ldit.config.model import OriginalDiTConfig, TextModelConfig
from ldit.config.sections import TextConfig
from ldit.errors import ConfigError

if TYPE_CHECKING:
    from ldit.config.run import RunConfig


def check_text(run: "RunConfig") -> None:
    """What a text model excludes, and what is for text models alone."""
    if not isinstance(run.model, TextModelConfig):
        if run.text != TextConfig():
            raise ConfigError("text: is for text models (model.kind text)")
        return
    if not 0 <= run.text.dropout < 1:
        raise ConfigError(f"text.dropout: must be in [0, 1), got {run.text.dropout}")
    if run.text.max_tokens < 1:
        raise ConfigError(f"text.max_tokens: must be at least 1, got {run.text.max_tokens}")
    if run.objective.route:
        raise ConfigError("objective.route: is for class models")
    if run.eval.every:
        raise ConfigError("eval.every: evaluation during training is for class models; use ldit evaluate")


def check_buckets(run: "RunConfig") -> None:
    """What images of several sizes exclude."""
    if not run.data.buckets:
        return
    if isinstance(run.model, OriginalDiTConfig):
        raise ConfigError("data.buckets: the original DiT has positions of one size")
    others = (
        ("stages", run.stages),
        ("objective.augment", run.objective.augment),
        ("objective.route", run.objective.route),
    )
    for key, given in others:
        if given:
            raise ConfigError(f"data.buckets: does not go with {key}")
    if isinstance(run.model, TextModelConfig):
        side = run.data.image_size // (run.codec.factor * run.model.patch_size)
        most = side * side + 2 * side  # an end-of-line token for each row of the tallest image
        if run.model.max_seq_len < most:
            raise ConfigError(
                f"data.buckets: images of {run.data.image_size} pixels have up to {most} tokens "
                f"(--model.max-seq-len {most})"
            )


def check_cascade(run: "RunConfig") -> None:
    """The sizes and channels of the second stage of a cascade, and what it excludes."""
    small, side, factor = run.cascade.size, run.data.image_size, run.codec.factor
    needed = run.model.in_channels if small else 0
    if run.model.cond_channels != needed:
        raise ConfigError(f"model.cond_channels: must be {needed} with cascade.size {small}")
    if small and (not 0 < small < side or side % small or small % factor):
        raise ConfigError(f"cascade.size: must divide data.image_size {side} and be a multiple of {factor}")
    if run.cascade.noise < 0:
        raise ConfigError(f"cascade.noise: must not be negative, got {run.cascade.noise}")
    for key, given in (
        ("stages", run.stages),
        ("data.buckets", run.data.buckets),
        ("eval.every", run.eval.every),
        ("objective.augment", run.objective.augment),
    ):
        if small and given:
            raise ConfigError(f"cascade.size: does not go with {key}")
