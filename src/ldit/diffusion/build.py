"""Builds a diffusion process from its configuration."""

from ldit.config.sections import ObjectiveConfig
from ldit.config.spec import DDPMConfig, ProcessConfig
from ldit.diffusion.ddpm import DDPM
from ldit.diffusion.flow import Flow
from ldit.diffusion.process import Process


def build_process(config: ProcessConfig, objective: ObjectiveConfig = ObjectiveConfig()) -> Process:  # noqa: B008
    """The process of `config`, with the loss of `objective`, which sampling does not use."""
    if isinstance(config, DDPMConfig):
        return DDPM(min_snr=objective.min_snr)
    return Flow(
        config.prediction,
        config.time_scale,
        config.data_at,
        config.shift,
        objective.min_snr,
        objective.direction,
        config.path,
        objective.loss_weight,
    )
