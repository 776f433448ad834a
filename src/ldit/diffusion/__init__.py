"""Objectives: `from ldit.diffusion import DDPM, Flow`."""

from ldit.diffusion.ddpm import DDPM
from ldit.diffusion.flow import Flow

__all__ = ["DDPM", "Flow"]
