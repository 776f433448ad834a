"""Builds a diffusion process from its configuration."""

from ldit.config.spec import DDPMConfig, ProcessConfig
from ldit.diffusion.ddpm import DDPM
from ldit.diffusion.flow import Flow
from ldit.diffusion.process import Process


def build_process(config: ProcessConfig) -> Process:
    """The process of `config`."""
    if isinstance(config, DDPMConfig):
        return DDPM()
    return Flow(config.prediction, config.time_scale, config.data_at, config.shift)
