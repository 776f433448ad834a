"""Diffusion processes: `from ldit.diffusion import DDPM, Flow, Prediction`."""

from ldit.diffusion.ddpm import DDPM
from ldit.diffusion.flow import Flow
from ldit.diffusion.process import Prediction

__all__ = ["DDPM", "Flow", "Prediction"]
