"""The kinds of things that are trained here, told apart by `model.kind` of their config.json."""

from typing import Any

from ldit.config.autoencoder import AutoencoderRun, AutoencoderSpec, is_autoencoder
from ldit.config.classifier import ClassifierRun, ClassifierSpec, is_classifier
from ldit.config.run import BaseRun, RunConfig
from ldit.config.spec import ModelSpec

AnySpec = ModelSpec | AutoencoderSpec | ClassifierSpec
"""The content of config.json of a step, whatever was trained."""


def run_from_json(data: Any) -> BaseRun:
    """The run of a RUN/config.json, whatever it trains; ConfigError names the key at fault."""
    if is_autoencoder(data):
        return AutoencoderRun.from_json(data)
    return ClassifierRun.from_json(data) if is_classifier(data) else RunConfig.from_json(data)


def spec_from_json(data: Any, where: str = "config.json") -> AnySpec:
    """The content of a step's or an export's config.json; ConfigError names the key at fault."""
    if is_autoencoder(data):
        return AutoencoderSpec.from_json(data, where)
    return ClassifierSpec.from_json(data, where) if is_classifier(data) else ModelSpec.from_json(data, where)
