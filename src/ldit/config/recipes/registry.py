"""Recipes by name: functions that return a whole configuration. `ldit train NAME` starts one; every field is a flag."""

from collections.abc import Callable

from ldit.config.recipes import emoji64, imagenet, tiny
from ldit.config.run import BaseRun, RunConfig
from ldit.errors import ConfigError

RECIPES: dict[str, Callable[[], BaseRun]] = {
    "emoji64-class-xs": emoji64.emoji64_class_xs,
    "emoji64-class-s": emoji64.emoji64_class_s,
    "emoji64-vae": emoji64.emoji64_vae,
    "emoji64-latent-s": emoji64.emoji64_latent_s,
    "extractor-small": tiny.extractor_small,
    "tiny-cpu": tiny.tiny_cpu,
    "imagenet256-600m": imagenet.imagenet256_600m,
    "imagenet256-3b": imagenet.imagenet256_3b,
    "imagenet256-7b": imagenet.imagenet256_7b,
    "imagenet512-3b": imagenet.imagenet512_3b,
}


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
