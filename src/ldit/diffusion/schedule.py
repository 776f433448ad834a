"""Discrete noise schedules: linear betas, respacing, and the float64 tables that follow from betas."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def linear_betas(steps: int) -> Array:
    """betas from 1e-4 to 0.02 for 1000 steps, scaled by 1000/steps otherwise (Ho et al. 2020)."""
    scale = 1000 / steps
    if scale * 0.02 >= 1:
        raise ValueError(f"linear betas need more than 20 steps, got {steps}")
    return np.linspace(scale * 1e-4, scale * 0.02, steps, dtype=np.float64)


def respace(steps: int, sections: str) -> tuple[int, ...]:
    """The indices of 0 … steps-1 that a respacing string keeps, ascending.

    "N" or "a,b,c": the steps are divided into as many sections as there are numbers, the first ones a step longer where
    needed. Each section keeps as many steps as its number says, spread evenly from its first to its last. "ddimN":
    every k-th step, with the smallest k that keeps exactly N. ValueError if that is impossible.
    """
    if sections.startswith("ddim"):
        count = _count(sections[4:], sections)
        for stride in range(1, steps + 1):
            if len(range(0, steps, stride)) == count:
                return tuple(range(0, steps, stride))
        raise ValueError(f"no stride keeps exactly {count} of {steps} steps")
    counts = [_count(part, sections) for part in sections.split(",")]
    kept: list[int] = []
    start = 0
    for i, count in enumerate(counts):
        size = steps // len(counts) + (1 if i < steps % len(counts) else 0)
        if count > size:
            of = f"a section of {size}" if len(counts) > 1 else f"the {size} of training"
            raise ValueError(f"cannot keep {count} steps of {of}")
        # Places are added up and rounded half to even, as in the original: a product would round elsewhere.
        spacing = 1.0 if count == 1 else (size - 1) / (count - 1)
        current = 0.0
        for _ in range(count):
            kept.append(start + round(current))
            current += spacing
        start += size
    return tuple(kept)


def _count(text: str, sections: str) -> int:
    if not text.strip().isdigit() or int(text) < 1:
        raise ValueError(f"steps {sections!r}: expected positive numbers such as '250', '10,15,20' or 'ddim50'")
    return int(text)


@dataclass(frozen=True)
class Tables:
    """The coefficients of DDPM's equations, float64, one entry a kept step."""

    betas: Array
    alphas_cumprod: Array
    alphas_cumprod_prev: Array
    posterior_variance: Array
    posterior_log_variance_clipped: Array
    posterior_mean_coef1: Array
    posterior_mean_coef2: Array


def tables(steps: int, kept: Sequence[int]) -> Tables:
    """Tables over the kept steps, which have the full schedule's cumulative products a_i: beta_i = 1 - a_i/a_prev."""
    full = np.cumprod(1.0 - linear_betas(steps))[list(kept)]
    betas = 1.0 - full / np.append(1.0, full[:-1])
    alphas = 1.0 - betas
    cumprod = np.cumprod(alphas)
    previous = np.append(1.0, cumprod[:-1])
    variance = betas * (1.0 - previous) / (1.0 - cumprod)
    # The posterior's variance is 0 at the first step and has no logarithm: that of the second step replaces it.
    clipped = np.append(variance[1], variance[1:]) if len(variance) > 1 else betas
    return Tables(
        betas=betas,
        alphas_cumprod=cumprod,
        alphas_cumprod_prev=previous,
        posterior_variance=variance,
        posterior_log_variance_clipped=np.log(clipped),
        posterior_mean_coef1=betas * np.sqrt(previous) / (1.0 - cumprod),
        posterior_mean_coef2=(1.0 - previous) * np.sqrt(alphas) / (1.0 - cumprod),
    )
