"""The kinds of models that can be trained, recognised by `model.kind` in config.json."""

from typing import Any

from ldit.config.autoencoder import AutoencoderRun, AutoencoderSpec, is_autoencoder
from ldit.config.classifier import ClassifierRun, ClassifierSpec, is_classifier
from ldit.config.run import BaseRun, RunConfig
from ldit.config.spec import ModelSpec

AnySpec = ModelSpec | AutoencoderSpec | ClassifierSpec
"""The config.json of a step of any kind of run."""


def run_from_json(data: Any) -> BaseRun:
    """The configuration in a RUN/config.json of any kind; ConfigError names the key at fault."""
    if is_autoencoder(data):
        return AutoencoderRun.from_json(data)
    return ClassifierRun.from_json(data) if is_classifier(data) else RunConfig.from_json(data)


def spec_from_json(data: Any, where: str = "config.json") -> AnySpec:
    """The spec in the config.json of a step or an export; ConfigError names the key at fault."""
    if is_autoencoder(data):
        return AutoencoderSpec.from_json(data, where)
    return ClassifierSpec.from_json(data, where) if is_classifier(data) else ModelSpec.from_json(data, where)
